# The whole project in an image: Python, torch, TensorFlow, a whole MPI, and Horovod
# built for them.
#
#   docker build -t hvd-sparse-demo .
#   docker run --rm hvd-sparse-demo                   # the main job: launch/demo
#   docker run --rm hvd-sparse-demo launch/test       # every check and test
#   docker build --target mpijob -t hvd-sparse-mpijob .   # with sshd, for launch/mpijob.yaml
#
# For GPUs, two base images, of which the first brings nvcc and NCCL's headers
# (Debian 12 or Ubuntu 22.04; their CUDA must be the one torch was built for):
#
#   docker build --build-arg BUILD_BASE=nvidia/cuda:VERSION-devel-ubuntu22.04 \
#                --build-arg BASE=nvidia/cuda:VERSION-runtime-ubuntu22.04 .
#
# Which torch comes is pip's choice: an index with CPU builds, given by
# --build-arg PIP_EXTRA_INDEX_URL=..., saves several GB.

ARG BASE=debian:bookworm-slim
ARG BUILD_BASE=${BASE}

# ------------------------------------------------------------------ what is built, once
FROM ${BUILD_BASE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates cmake g++ git make python3 python3-dev python3-venv \
    && useradd --create-home --uid 1000 hvd \
    && install -d -o hvd /opt/hvd_sparse
USER hvd
WORKDIR /opt/hvd_sparse
ARG PIP_EXTRA_INDEX_URL
# Only what set-up reads, README.md, which it wants to be there, left empty: another change
# to the project does not build Horovod again.
RUN touch README.md
COPY --chown=hvd pyproject.toml constraints*.txt LICENSE ./
COPY --chown=hvd launch/setup launch/build-horovod launch/mpi-environment.sh \
    launch/python.sh launch/
COPY --chown=hvd hvd_sparse/__init__.py hvd_sparse/
# Horovod's mark names the compiler, which the final image has not: without the mark a
# Horovod that works is left as it is.
RUN PIP_NO_CACHE_DIR=1 launch/setup \
    && launch/build-horovod \
    && rm -rf .venv/.hvd-sparse-horovod ~/.cache

# ------------------------------------------------------------------------ what is shipped
FROM ${BASE} AS demo
# ssh starts the ranks on other hosts; there is nothing here that lets anyone in.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git openssh-client python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 hvd \
    && install -d -o hvd /opt/hvd_sparse
USER hvd
WORKDIR /opt/hvd_sparse
ENV PATH=/opt/hvd_sparse/.venv/bin:$PATH
CMD ["launch/demo"]
COPY --from=build --chown=hvd /opt/hvd_sparse ./
COPY --chown=hvd . ./

# -------------------------------------------- what Kubernetes' MPI operator starts as pods
FROM demo AS mpijob
USER root
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        openssh-server \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && install -d -o hvd -m 700 /home/hvd/.ssh \
    && cp launch/sshd_config /home/hvd/.sshd_config \
    && cp launch/ssh_config /etc/ssh/ssh_config.d/mpijob.conf
USER hvd

# The default: without sshd.
FROM demo
