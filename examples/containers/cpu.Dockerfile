# The demo, on processors, with the tiny model. From the top of the repository:
#
#     docker build -f examples/containers/cpu.Dockerfile -t vllm-orthrus-demo .
#     docker run --rm vllm-orthrus-demo                              # compares plain decoding and drafting
#     docker run --rm -p 8000:8000 vllm-orthrus-demo demo --serve    # serves it
FROM python:3.11-slim-bookworm AS environment
# A compiler, because PyTorch compiles the model's graph on the machine that it runs on. vLLM's kernels are linked to libnuma.
RUN apt-get update && apt-get install --no-install-recommends --yes g++=4:12.2.0-3 libnuma1=2.0.16-1 && rm -rf /var/lib/apt/lists/*
WORKDIR /orthrus
COPY . .
RUN python3 scripts/make_env.py --folder .venv --extras ''

FROM environment
LABEL org.opencontainers.image.title="vllm-orthrus-demo" \
      org.opencontainers.image.description="A tiny model that drafts for itself, on processors" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 1000 vllm
USER 1000
EXPOSE 8000
ENTRYPOINT ["/orthrus/.venv/bin/vllm-orthrus"]
CMD ["demo"]
