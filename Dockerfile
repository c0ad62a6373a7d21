# Build: docker build -t distill-pretrain .
# Run:   docker run --gpus all --ipc=host -v "$PWD/runs:/runs" distill-pretrain train recipe.yaml
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-devel

# The image's torch stays: it is listed as a constraint, so that no dependency replaces it.
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

RUN useradd --create-home --uid 1000 distill \
    && mkdir /runs \
    && chown distill /runs

WORKDIR /opt/distill-pretrain
COPY setup.py pyproject.toml README.md ./
COPY distill_pretrain ./distill_pretrain
COPY launch ./launch

RUN python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && python -m pip install --constraint /tmp/constraints.txt ".[hf,eval]" \
    && rm /tmp/constraints.txt

USER 1000
WORKDIR /runs
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s --retries=3 CMD ["distill-pretrain", "doctor"]
ENTRYPOINT ["distill-pretrain"]
CMD ["--help"]
