# GPU (default): NVIDIA's PyTorch image, which carries Transformer Engine and apex. 25.09, with torch 2.9 and an
# older Transformer Engine, does not fit megatron-core 0.16.
#   docker build -t nvlm-train .
# CPU:
#   docker build -t nvlm-train:cpu --build-arg BASE=python:3.11-slim .
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/nvlm-train

# NVIDIA's image brings its own torch, which matches its kernels: what is installed stays as it is, and an
# image whose torch or Transformer Engine does not fit ends the build (docs/install.md).
COPY constraints.txt constraints-gpu.txt setup.py pyproject.toml README.md LICENSE ./
COPY install install
COPY nvlm_train nvlm_train
COPY recipes recipes
COPY data_recipes data_recipes
COPY launch launch
RUN if python -c 'import torch' 2>/dev/null; then \
        python install/pins.py here > /tmp/here.txt \
        && pip install -c /tmp/here.txt . \
        && python -m nvlm_train.doctor.stack ; \
    else \
        apt-get update && apt-get install -y --no-install-recommends make gcc g++ \
        && rm -rf /var/lib/apt/lists/* \
        && pip install -c constraints.txt torch \
        && pip install -c constraints.txt '.[demo]' ; \
    fi

WORKDIR /workspace
ENTRYPOINT ["nvlm"]
CMD ["--help"]
