# The README's steps in images: `serve` (no torch), `worker` (audits; its `serve --state` has the audit API, too), `gpu` (serving on NVIDIA GPUs, with TensorRT).
#   docker build --target serve --tag tenet-serve .

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
RUN useradd --uid 10001 --create-home tenet
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/ /wheels/

FROM base AS serve
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt /wheels/tenet-*.whl
USER 10001
EXPOSE 8001
HEALTHCHECK --interval=10s --start-period=30s \
    CMD ["python", "-c", "from service.client import Client; raise SystemExit(not Client('127.0.0.1:8001').ready())"]
ENTRYPOINT ["tenet"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0"]

FROM base AS worker
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(echo /wheels/tenet-*.whl)[audit,web]" \
    && install --directory --owner tenet /state
USER 10001
VOLUME /state
# A worker that has died holds no lock: the kernel takes it back.
HEALTHCHECK --interval=10s --start-period=60s CMD ["sh", "-c", "! flock --nonblock /state/work.lock true"]
ENTRYPOINT ["tenet"]
CMD ["work", "--repository", "/models", "--state", "/state"]

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS gpu
RUN apt-get update \
    && apt-get install --no-install-recommends --yes python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tenet \
    && useradd --uid 10001 --create-home tenet
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/ /wheels/
RUN /opt/tenet/bin/pip install --no-cache-dir --constraint /wheels/constraints.txt \
    "$(echo /wheels/tenet-*.whl)[tensorrt,tensorrt-rtx]"
ENV PATH=/opt/tenet/bin:$PATH
COPY configs/service-gpu.toml /etc/tenet/service.toml
USER 10001
EXPOSE 8001
HEALTHCHECK --interval=10s --start-period=60s \
    CMD ["python", "-c", "from service.client import Client; raise SystemExit(not Client('127.0.0.1:8001').ready())"]
ENTRYPOINT ["tenet"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0", "--settings", "/etc/tenet/service.toml"]
