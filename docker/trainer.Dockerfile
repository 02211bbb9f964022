# `datamerge train`, alone or under torchrun, and TensorBoard.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
# The CPU build of torch. For CUDA: https://download.pytorch.org/whl/cu… as pytorch.org names it for your driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore RAY_USAGE_STATS_ENABLED=0

# /data is for a volume: a new one takes over the owner.
RUN useradd --uid 1000 --user-group --create-home datamerge && install --directory --owner=datamerge --group=datamerge /data

# From what seldom changes to what often does. Both images share the layers down to torch, and the next with equal EXTRAS.
# torch and torchvision come from one index, or do not fit each other. Beside PyPI, an index that cannot be reached or lacks the
# version would go unnoticed: PyPI's CUDA build, 4 GB larger, would be taken.
WORKDIR /opt/datamerge
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --no-deps --index-url "${TORCH_INDEX}" torch torchvision \
    && pip install --constraint constraints.txt torch torchvision
# On GPUs torch.compile calls a C compiler.
# hadolint ignore=DL3008
RUN case "${TORCH_INDEX}" in */cpu) ;; *) \
    apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; esac
ARG EXTRAS=train,s3
COPY pyproject.toml docker/requirements.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py "${EXTRAS}" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,target=/source \
    pip install --no-deps /source

# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /data
# A CUDA build that sees no GPU would go on on the CPU, and containers do lose their GPUs.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import torch; exit(torch.version.cuda is not None and not torch.cuda.is_available())"]
ENTRYPOINT ["datamerge"]
CMD ["--help"]
