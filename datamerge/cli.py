"""The `datamerge` command. Sub-commands are imported when they are called, so that help appears at once."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from datamerge.packages import Unavailable, load

# name → (module, attribute, extra with its dependencies, one-line help)
COMMANDS = {
    "merge": (
        "merge_service.cli",
        "merge",
        "merge",
        "Make groups of similar samples and store their moments.",
    ),
    "train": ("trainer.cli", "train", "train", "Fine-tune an encoder on an artifact."),
    "export-encoder": (
        "trainer.export.command",
        "export_encoder",
        "train",
        "Write a trained encoder for open_clip or Hugging Face.",
    ),
    "evaluate": (
        "datamerge.evaluation.cli",
        "evaluate",
        "eval",
        "Measure encoders on raw images, clean and under attack.",
    ),
    "inspect": ("datamerge.tools.inspection", "inspect", "", "Show what an artifact holds and where it comes from."),
    "verify": ("datamerge.tools.inspection", "verify", "", "Check every file of an artifact against its hashes."),
    "preview": ("datamerge.tools.inspection", "preview", "", "Draw a contact sheet of an artifact's groups."),
    "convert": ("datamerge.tools.cli", "convert", "", "Write an artifact in another format or encoding."),
    "remerge": ("datamerge.tools.cli", "remerge_members", "", "Merge stored members again: other N, other factors."),
    "combine": ("datamerge.tools.cli", "combine", "", "Write the union of artifacts, group by group."),
    "diff": ("datamerge.tools.cli", "diff", "", "Compare two artifacts group by group."),
    "export": ("datamerge.tools.cli", "export", "", "Write single groups as .npz or .png files."),
    "demo": ("datamerge.demo.cli", "demo", "demo", "Run the whole pipeline on real handwritten digits."),
}


class CannotLoad(click.ClickException):
    """A command whose packages are not installed, or are hidden by others of the same name."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group whose commands are imported on first use.

    Attributes:
        alone: whether the process runs nothing but this command, so that messages may name flags.
    """

    alone = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, extra, _ = COMMANDS[cmd_name]
        try:
            command: click.Command = load(module, attribute, extra=extra, needed_by=f"`datamerge {cmd_name}`")
        except Unavailable as error:
            raise CannotLoad(str(error)) from None
        # Imported late: `--help` must not wait for pydantic, and `load` has checked that nothing hides our packages.
        from datamerge.runtime.messages import speak_as
        from datamerge.runtime.options import spell_flags_of

        spell_flags_of(command)
        _accept_after(command)
        if self.alone:
            speak_as(_as_flags)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and close and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's implementation would import every command, and with them torch.
        names = [CompletionItem(name, help=row[3]) for name, row in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, _, text) in COMMANDS.items()])


def _set_in_environment(ctx: click.Context, parameter: click.Parameter, is_set: bool) -> None:
    if is_set and not ctx.resilient_parsing:
        os.environ[f"DATAMERGE_{str(parameter.name).upper()}"] = "1"


def _everywhere(*, hidden: bool) -> list[click.Option]:
    """Options that may stand before the command or after it; only the first are in a help text."""

    def flag(*names: str, help: str) -> click.Option:
        return click.Option(
            names,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_in_environment,
            hidden=hidden,
            help=help,
        )

    return [
        flag("-q", "--quiet", help="Print no progress and no hints on stderr, only warnings and errors."),
        flag("-v", "--verbose", help="Print the traceback of an error, for a bug report."),
    ]


def _accept_after(command: click.Command) -> None:
    """Let a command, and its sub-commands, accept the options that may stand anywhere."""
    known = {parameter.name for parameter in command.params}
    command.params += [option for option in _everywhere(hidden=True) if option.name not in known]
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _accept_after(below)


def _show_version(ctx: click.Context, parameter: click.Parameter, show: bool) -> None:
    if show and not ctx.resilient_parsing:
        from datamerge import __version__

        click.echo(f"datamerge, version {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Adversarial fine-tuning of image encoders from artifacts: images, their embeddings, and attacks or groups.

    \b
    datamerge merge photos/ my-artifact --encoder open_clip:ViT-B-32/openai --attack none
    datamerge train my-artifact my-run --preset fare2
    datamerge evaluate my-run --data test-photos/

    Shell completion (bash; also zsh and fish): eval "$(_DATAMERGE_COMPLETE=bash_source datamerge)"
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


cli.params += _everywhere(hidden=False)


def run() -> NoReturn:
    """Entry point: run `main` and end the process, whatever threads libraries have left running."""
    LazyGroup.alone = True
    try:
        main()
    except SystemExit as end:
        # Ray and distributed training leave such threads.
        if "ray" not in sys.modules and os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        code = end.code
    from datamerge.runtime.process_end import end_process

    end_process(code if isinstance(code, int) else 0)


def main() -> NoReturn:
    """Run the command. Expected errors become one line and an exit code (2: wrong request, 1: failure)."""
    try:
        # Outside standalone mode click returns the code of an Exit, or the return value of the command.
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        sys.exit(_report(error))


def _as_flags(message: str) -> str:
    """A message with its settings as flags, except at its start, where a path may look like a setting."""
    from datamerge.runtime.options import as_flags

    return as_flags(message, in_front=False)


def _report(error: Exception) -> int:
    """Print an expected error in one line; re-raise any other, whose traceback shows the bug."""
    from datamerge.runtime.options import as_flags
    from storage_schemas.access.redaction import redact
    from storage_schemas.errors import DatamergeError, printable

    if os.environ.get("DATAMERGE_VERBOSE", "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, DatamergeError):
        message = as_flags(str(error), in_front=error.field is not None)
        click.echo(f"error: {printable(redact(message))}", err=True)
        return error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {printable(redact(f'{where}{error.strerror or error}'))}", err=True)
        return 1
    raise error


if __name__ == "__main__":
    run()
