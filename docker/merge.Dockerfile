FROM python:3.11-slim
WORKDIR /opt/datamerge
COPY constraints.txt ./
# The CPU build by default; pass --build-arg TORCH_INDEX=… for a CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[merge]' && useradd --create-home datamerge
USER datamerge
WORKDIR /home/datamerge
ENTRYPOINT ["datamerge"]
