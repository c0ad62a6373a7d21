# Build:  docker build -t distill-pretrain:0.1.0 .
# Verb:   docker run --gpus all --ipc=host -v "$PWD/runs:/runs" distill-pretrain:0.1.0 doctor
# Node:   docker run --gpus all --ipc=host --network=host -v /data:/data --entrypoint launch/torchrun_single.sh \
#             distill-pretrain:0.1.0 train launch/recipes/cluster/student_300m_from_3b_8gpu.yaml
# --ipc=host: NCCL and the loaders share memory between processes; 64 MB of /dev/shm is too little.
#
# Linted, never built. The base has Python 3.12, CUDA, cuDNN, NCCL and the compiler that builds the cache's coder.
# Neither Transformer Engine nor apex is in it, and no test has run with them. megatron-core 0.19 asks for no version of
# Transformer Engine and uses what it has up to 2.14; 0.16 asks for >=2.9,<2.12. apex has no versions: NVIDIA's sources.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    VENV=none

RUN useradd --create-home --uid 1000 distill \
    && mkdir /runs \
    && chown distill /runs

WORKDIR /opt/distill-pretrain
# The image's own torch stays: it is a constraint, so that nothing replaces it; launch/constraints.txt pins the rest.
COPY launch/constraints.txt /tmp/pins.txt
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY distill_pretrain ./distill_pretrain
COPY launch ./launch
RUN python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && cat /tmp/pins.txt >> /tmp/constraints.txt \
    && python -m pip install --constraint /tmp/constraints.txt ".[hf,eval]" \
    && rm /tmp/constraints.txt /tmp/pins.txt

USER 1000
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s --retries=3 CMD ["distill-pretrain", "doctor"]
ENTRYPOINT ["distill-pretrain"]
CMD ["--help"]
