# The merge service: head, workers and driver of a Ray cluster are the same image.
#
#   docker build -f docker/merge.Dockerfile -t datamerge-merge .
#   docker build -f docker/merge.Dockerfile -t datamerge-merge:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Where torch comes from: the CPU builds, or those of a CUDA version (…/whl/cu126), which bring CUDA themselves.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=merge,s3,gcs,http

# A named volume takes the owner of the folder that it is mounted on.
RUN useradd --create-home --uid 1000 datamerge && install -d -o datamerge /home/datamerge/shared
WORKDIR /opt/datamerge

# From what changes least to what changes most: torch, then the other libraries, then datamerge itself.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch torchvision
COPY pyproject.toml README.md LICENSE datamerge.py ./
RUN mkdir storage_schemas console sources adversarial merge_service trainer evaluation artifact_tools demo \
    && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" \
    && pip uninstall --yes datamerge
COPY . .
RUN pip install --no-cache-dir --no-deps .

USER datamerge
WORKDIR /home/datamerge
ENV RAY_USAGE_STATS_ENABLED=0
# A node of a Ray cluster is healthy while it reaches the head; a container without Ray, while the command answers.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s \
    CMD if [ -e /tmp/ray/ray_current_cluster ]; then ray status > /dev/null; else datamerge --version; fi
ENTRYPOINT ["datamerge"]
CMD ["--help"]
