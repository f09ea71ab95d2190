# An image with the tested versions, for CPUs, GPUs or TPUs:
#   docker build --tag dualformer .
#   docker build --tag dualformer --build-arg EXTRAS=prepare,cuda .
#   docker build --tag dualformer --build-arg EXTRAS=prepare,tpu .
#   docker run --rm -it --volume "$PWD:/work" dualformer \
#     python -m dualformer_jax.predict --checkpoint=checkpoints/tiny video.mp4
# Add --gpus=all for GPUs, and --privileged --network=host for TPUs.
FROM python:3.13-slim

# Extras of setup.cfg. Wheels contain FFmpeg, OpenCV and CUDA, so the system
# needs no other packages.
ARG EXTRAS=prepare

WORKDIR /usr/local/src/dualformer_jax
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY dualformer_jax dualformer_jax
RUN pip install --no-cache-dir --constraint constraints.txt \
  --editable ".[${EXTRAS}]"
COPY configs configs
COPY data data
COPY scripts scripts

# Files written to a mounted folder belong to this user; --user changes it.
RUN useradd --create-home --uid 1000 dualformer \
  && mkdir /work && chown dualformer /work
USER dualformer
ENV PYTHONUNBUFFERED=1
WORKDIR /work
CMD ["python", "-m", "dualformer_jax"]
