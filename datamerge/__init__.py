"""Adversarial fine-tuning of image encoders from artifacts that are computed once and streamed by every run.

    import datamerge as dm

    dm.merge(dm.MergeConfig(source="photos", artifact="clean", encoder="open_clip:ViT-B-32/openai", attack="none"))
    dm.train(dm.TrainConfig(artifact="clean", run="run", arm="clean", refine_steps=2, epsilon="2/255", steps=16_400))

Names are imported on first use, so `import datamerge` takes milliseconds and reading an artifact needs no torch.
"""

TYPE_CHECKING = False  # type checkers know the name; importing `typing` would take most of the time
if TYPE_CHECKING:
    from datamerge.artifacts import combine, convert, diff, export, inspect, preview, remerge, verify
    from datamerge.attacks import APGD, PGD, Attacked, NonFiniteGradient, cross_entropy, squared_error
    from datamerge.attacks import run_attack as attack
    from datamerge.encoders import Encoder, Head, load_encoder, load_head, save_encoder
    from datamerge.evaluation import ArmResult, EvaluateConfig, Results, evaluate
    from datamerge.evaluation.config import EmbeddingConfig, ZeroShotConfig
    from datamerge.evaluation.embedding import evaluate_embedding
    from datamerge.evaluation.llava.captions import evaluate_captions
    from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
    from datamerge.evaluation.llava.vqa import evaluate_vqa
    from datamerge.evaluation.parts import evaluate_all
    from datamerge.evaluation.zero_shot import evaluate_zero_shot
    from datamerge.sources import Source, open_source
    from datamerge.sources.inspection import inspect_source
    from merge_service import MergeConfig, MergeResult, merge
    from storage_schemas import (
        ArraySpec,
        Artifact,
        ArtifactWriter,
        Cache,
        Commit,
        ConfigError,
        CorruptShard,
        DatamergeError,
        ExactMoments,
        Layout,
        Location,
        Manifest,
        NotAnArtifact,
        Record,
        Reject,
        SchemaError,
        SourceError,
        UnknownVersion,
        UserError,
        encode_exact,
        open_artifact,
    )
    from storage_schemas.operations.diff import Difference
    from storage_schemas.operations.remerge import Remerge
    from storage_schemas.schema.pixel_length import PixelLength
    from storage_schemas.schema.run import RunSummary
    from storage_schemas.verify import Report
    from trainer import NotFiniteRun, Stopped, TrainConfig, train
    from trainer.export.command import export as export_encoder

    __version__: str

__all__ = [
    "APGD",
    "PGD",
    "ArmResult",
    "ArraySpec",
    "Artifact",
    "ArtifactWriter",
    "Attacked",
    "Cache",
    "CaptionsConfig",
    "Commit",
    "ConfigError",
    "CorruptShard",
    "DatamergeError",
    "Difference",
    "EmbeddingConfig",
    "Encoder",
    "EvaluateConfig",
    "ExactMoments",
    "Head",
    "Layout",
    "Location",
    "Manifest",
    "MergeConfig",
    "MergeResult",
    "NonFiniteGradient",
    "NotAnArtifact",
    "NotFiniteRun",
    "PixelLength",
    "Record",
    "Reject",
    "Remerge",
    "Report",
    "Results",
    "RunSummary",
    "SchemaError",
    "Source",
    "SourceError",
    "Stopped",
    "TrainConfig",
    "UnknownVersion",
    "UserError",
    "VqaConfig",
    "ZeroShotConfig",
    "__version__",
    "attack",
    "combine",
    "convert",
    "cross_entropy",
    "diff",
    "encode_exact",
    "evaluate",
    "evaluate_all",
    "evaluate_captions",
    "evaluate_embedding",
    "evaluate_vqa",
    "evaluate_zero_shot",
    "export",
    "export_encoder",
    "inspect",
    "inspect_source",
    "load_encoder",
    "load_head",
    "merge",
    "open_artifact",
    "open_source",
    "preview",
    "remerge",
    "save_encoder",
    "squared_error",
    "train",
    "verify",
]

# Module → its public names; `public=name` where the module uses another name.
_MODULES = {
    "datamerge.artifacts": "combine convert diff export inspect preview remerge verify",
    "datamerge.attacks": "APGD Attacked NonFiniteGradient PGD attack=run_attack cross_entropy squared_error",
    "datamerge.encoders": "Encoder Head load_encoder load_head save_encoder",
    "datamerge.evaluation": "ArmResult EvaluateConfig Results evaluate",
    "datamerge.evaluation.config": "EmbeddingConfig ZeroShotConfig",
    "datamerge.evaluation.embedding": "evaluate_embedding",
    "datamerge.evaluation.llava.captions": "evaluate_captions",
    "datamerge.evaluation.llava.config": "CaptionsConfig VqaConfig",
    "datamerge.evaluation.llava.vqa": "evaluate_vqa",
    "datamerge.evaluation.parts": "evaluate_all",
    "datamerge.evaluation.zero_shot": "evaluate_zero_shot",
    "datamerge.sources": "Source open_source",
    "datamerge.sources.inspection": "inspect_source",
    "merge_service": "MergeConfig MergeResult merge",
    "storage_schemas": "ArraySpec Artifact ArtifactWriter Cache Commit ConfigError CorruptShard DatamergeError "
    "ExactMoments Layout Location Manifest NotAnArtifact Record Reject SchemaError SourceError UnknownVersion "
    "UserError encode_exact open_artifact",
    "storage_schemas.operations.diff": "Difference",
    "storage_schemas.operations.remerge": "Remerge",
    "storage_schemas.schema.pixel_length": "PixelLength",
    "storage_schemas.schema.run": "RunSummary",
    "storage_schemas.verify": "Report",
    "trainer": "NotFiniteRun Stopped TrainConfig train",
    "trainer.export.command": "export_encoder=export",
}
# Package → the extra that installs its dependencies.
_EXTRAS = {
    "datamerge.attacks": "models",
    "datamerge.encoders": "models",
    "datamerge.evaluation": "eval",
    "datamerge.sources": "merge",
    "merge_service": "merge",
    "trainer": "train",
}
_PLACES = {
    name: (module, attribute or name)
    for module, names in _MODULES.items()
    for name, _, attribute in (entry.partition("=") for entry in names.split())
}

if not TYPE_CHECKING:  # with `__getattr__`, type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value = _version()
        elif name in _PLACES:
            from datamerge.packages import load

            module, attribute = _PLACES[name]
            extra = next((extra for package, extra in _EXTRAS.items() if f"{module}.".startswith(f"{package}.")), "")
            value = load(module, attribute, extra=extra, needed_by=f"datamerge.{name}")
        else:
            raise AttributeError(f"module 'datamerge' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version of the installed distribution; `0+unknown` in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("datamerge")
    except PackageNotFoundError:
        return "0+unknown"
