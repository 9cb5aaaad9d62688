# GPU (default): NVIDIA's PyTorch image, which carries transformer-engine and apex.
#   docker build -t nvlm-train .
# CPU:
#   docker build -t nvlm-train:cpu --build-arg BASE=python:3.11-slim .
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/nvlm-train

# NVIDIA's image brings its own torch, which matches its kernels: it is kept, and our pin left out.
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY nvlm_train nvlm_train
COPY recipes recipes
COPY data_recipes data_recipes
COPY launch launch
RUN if python -c 'import torch' 2>/dev/null; then \
        pip install megatron-core==0.16.1 hydra-core==1.3.8 webdataset==1.0.2 simplejpeg==1.9.0 \
            wandb==0.31.0 rich==15.0.0 safetensors tokenizers fsspec pillow psutil \
        && pip install --no-deps . ; \
    else \
        apt-get update && apt-get install -y --no-install-recommends make gcc g++ \
        && rm -rf /var/lib/apt/lists/* \
        && pip install -c constraints.txt torch==2.13.0 \
        && pip install -c constraints.txt '.[demo]' ; \
    fi

WORKDIR /workspace
ENTRYPOINT ["nvlm"]
CMD ["--help"]
