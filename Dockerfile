# Two images: `service`, which is what a build without --target makes, and `demo`, with a QEMU in it.

FROM debian:trixie-slim AS build
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /src/
RUN python3 -m venv /opt/blockjobd \
 && /opt/blockjobd/bin/pip install --quiet --no-cache-dir --require-hashes --requirement /src/requirements.lock
COPY . /src/
RUN /opt/blockjobd/bin/pip install --quiet --no-cache-dir --no-deps /src \
 && /opt/blockjobd/bin/pip uninstall --quiet --yes pip

FROM debian:trixie-slim AS runtime
# qemu-img reads the images of domains that are off, and measures what a merge will copy. Receivers of webhooks are known
# by their certificates.
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
      ca-certificates python3 qemu-utils \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 8470 blockjobd \
 && useradd --uid 8470 --gid 8470 --no-create-home --home-dir /var/lib/blockjobd --shell /usr/sbin/nologin blockjobd \
 && install --directory --owner=blockjobd --group=blockjobd --mode=0700 /var/lib/blockjobd \
 && install --directory --owner=blockjobd --group=blockjobd /run/blockjobd /images
COPY --from=build /opt/blockjobd /opt/blockjobd
ENV PATH=/opt/blockjobd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    BLOCKJOBD_LISTEN=0.0.0.0:8470 \
    BLOCKJOBD_STATE_DIR=/var/lib/blockjobd \
    BLOCKJOBD_QMP_DIR=/run/blockjobd \
    BLOCKJOBD_LOG_FORMAT=json
USER 8470:8470
ENTRYPOINT ["blockjobd"]

FROM runtime AS demo
USER root
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends qemu-system-x86 curl \
 && rm -rf /var/lib/apt/lists/*
USER 8470:8470
CMD ["demo"]

FROM runtime AS service
# The folder of QMP sockets, and what has to outlive the container: journal, tokens, lock.
VOLUME ["/run/blockjobd", "/var/lib/blockjobd"]
EXPOSE 8470
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8470/livez', timeout=3)"]
CMD ["serve"]
