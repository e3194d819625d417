# Two images from one file: `operator` (no torch) and `trainer` (no compiler, unless COMPILER=gcc).
#
#   docker build --target operator .
#   docker build --target trainer .                                                             GPU: PyPI's torch is CUDA's
#   docker build --target trainer --build-arg DS_ACCELERATOR=cpu --build-arg TORCH_BACKEND=cpu .        CPU
#
# Dependencies come from pyproject.toml and constraints.txt alone and are layers of their own; our code is the last, thin one.

# Both bases must have the same python3, at the same path: the virtual environment is made on one and runs on the other.
ARG BASE=docker.io/library/python:3.11-slim
ARG BUILD_BASE=${BASE}

# ---- tools: compilers, and the empty virtual environment that all stages fill or copy
FROM ${BUILD_BASE} AS tools
# The system's certificates, as a proxy's authority may be among them.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    UV_CACHE_DIR=/cache/uv UV_LINK_MODE=copy PIP_DISABLE_PIP_VERSION_CHECK=1
RUN missing=""; \
    command -v g++ >/dev/null || missing="$missing g++"; \
    test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || missing="$missing python3-dev"; \
    test -z "$missing" || (apt-get update -q && apt-get install -q -y --no-install-recommends $missing)
RUN python3 -m venv --without-pip /opt/venv \
 && echo /opt/luthier > "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/luthier.pth"

# ---- resolve: the exact packages of each image, so that an edit of pyproject.toml that changes none of them rebuilds nothing
FROM tools AS resolve
ARG FIND_LINKS=
ARG TORCH_BACKEND=
# Trackers whose packages only some installations need: wandb.
ARG TRACKERS=
WORKDIR /resolve
COPY constraints.txt pyproject.toml ./
RUN python3 -m venv /opt/tools && /opt/tools/bin/pip install -q --no-cache-dir -c constraints.txt uv hatchling
RUN --mount=type=cache,target=/cache/uv for extra in operator trainer; do \
      more=""; test $extra = operator || for tracker in $TRACKERS; do more="$more --extra=$tracker"; done; \
      /opt/tools/bin/uv pip compile -q --python /opt/venv/bin/python --no-header --no-annotate ${FIND_LINKS:+--find-links=$FIND_LINKS} \
        ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} --constraints constraints.txt --extra $extra $more -o $extra.txt pyproject.toml || exit 1; \
    done \
 && echo deepspeed ninja setuptools torch | tr ' ' '\n' | /opt/tools/bin/uv pip compile -q --python /opt/venv/bin/python --no-header --no-annotate \
      ${FIND_LINKS:+--find-links=$FIND_LINKS} ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} --constraints trainer.txt --constraints constraints.txt \
      -o deepspeed.txt -

# ---- source: our own packages, installed beside the environment (its luthier.pth finds them)
FROM resolve AS source
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY crds crds
COPY operator operator
COPY cli cli
COPY trainer trainer
RUN /opt/tools/bin/hatchling build -t wheel -d /dist >/dev/null \
 && /opt/tools/bin/uv pip install -q --offline --no-deps --no-cache --python /opt/venv/bin/python --target /opt/luthier /dist/*.whl \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/luthier

# ---- operator-dependencies
FROM tools AS operator-dependencies
COPY --from=resolve /opt/tools/bin/uv /usr/local/bin/uv
COPY --from=resolve /resolve/operator.txt /resolve/operator.txt
RUN --mount=type=cache,target=/cache/uv uv pip install -q --python /opt/venv/bin/python --no-deps -r /resolve/operator.txt
# A non-root user on a read-only root can never write byte-code: without this every start compiles every module.
RUN /opt/venv/bin/python -m compileall -q -j 2 --invalidation-mode unchecked-hash /opt/venv/lib

# ---- deepspeed: a wheel with its operators in it
FROM tools AS deepspeed
ARG FIND_LINKS=
ARG TORCH_BACKEND=
COPY --from=resolve /opt/tools/bin/uv /usr/local/bin/uv
COPY --from=resolve /resolve/deepspeed.txt /resolve/deepspeed.txt
RUN --mount=type=cache,target=/cache/uv grep -v '^deepspeed==' /resolve/deepspeed.txt > /resolve/packages.txt \
 && uv pip install -q --python /opt/venv/bin/python --no-deps ${FIND_LINKS:+--find-links=$FIND_LINKS} \
      ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} -r /resolve/packages.txt \
 && python3 -m venv /opt/pip
# DeepSpeed compiles its operators at first use, which takes minutes, a compiler and 2.5 GB: build here those that we use. It asks for
# -march=native and the builder's own SIMD width, which an older node answers with SIGILL: compile for x86-64-v3 (AVX2) instead.
# An operator is only loaded by the accelerator it was built for, and that of CUDA has no shm_comm.
RUN printf '%s\n' '#!/bin/bash' \
      'a=("${@/#-march=native/-march=x86-64-v3}"); exec /usr/bin/g++ "${a[@]/#-D__AVX512__/-D__AVX256__}"' \
      > /usr/local/bin/portable-g++ && chmod 755 /usr/local/bin/portable-g++
ARG DS_ACCELERATOR=cuda
RUN export CC=/usr/local/bin/portable-g++ CXX=/usr/local/bin/portable-g++ PATH=/opt/venv/bin:$PATH \
      DS_ACCELERATOR=$DS_ACCELERATOR DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 MAX_JOBS=2; \
    test "$DS_ACCELERATOR" != cpu || export DS_BUILD_SHM_COMM=1; \
    /opt/pip/bin/pip --python /opt/venv/bin/python wheel -q --no-deps --no-cache-dir --no-build-isolation --no-binary deepspeed \
      --wheel-dir /wheel "$(grep '^deepspeed==' /resolve/deepspeed.txt)"

# ---- trainer-dependencies
FROM tools AS trainer-dependencies
ARG FIND_LINKS=
ARG TORCH_BACKEND=
COPY --from=resolve /opt/tools/bin/uv /usr/local/bin/uv
COPY --from=resolve /resolve/trainer.txt /resolve/trainer.txt
RUN --mount=type=cache,target=/cache/uv grep -v '^deepspeed==' /resolve/trainer.txt > /resolve/packages.txt \
 && uv pip install -q --python /opt/venv/bin/python --no-deps ${FIND_LINKS:+--find-links=$FIND_LINKS} \
      ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} -r /resolve/packages.txt
COPY --from=deepspeed /wheel /wheel
ARG DS_ACCELERATOR=cuda
RUN uv pip install -q --offline --no-cache --no-deps --python /opt/venv/bin/python /wheel/*.whl \
 && find /opt/venv -path '*deepspeed*' -name '*.so' -exec strip --strip-debug {} + \
 && /opt/venv/bin/python -c "import runpy, glob; built = runpy.run_path(glob.glob('/opt/venv/lib/*/site-packages/deepspeed/git_version_info_installed.py')[0]); \
      a, o = built['accelerator_name'], built['installed_ops']; \
      assert a == '$DS_ACCELERATOR' and o['cpu_adam'] and (a != 'cpu' or o['deepspeed_shm_comm']), (a, o)"
# What a pod never opens. torchgen looks like it, but `import torch` needs it.
RUN cd "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && rm -rf ninja ninja-* /opt/venv/bin/ninja torch/test torch/include torch/share torch/lib/libtorchbind_test.so torch/lib/libbackend_with_compiler.so \
 && find bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name '*_cuda13*.so' -delete \
 && find . -type d -name tests -prune -exec rm -rf {} + && find . -name '*.a' -delete \
 && /opt/venv/bin/python -m compileall -q -j 2 --invalidation-mode unchecked-hash -x 'py312_intrinsics' /opt/venv/lib

# ---- operator
FROM ${BASE} AS operator
COPY --from=operator-dependencies /opt/venv /opt/venv
COPY --from=source /opt/luthier /opt/luthier
ENV PATH=/opt/luthier/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp USER=luthier PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
ENTRYPOINT ["luthier", "operator"]

# ---- trainer
FROM ${BASE} AS trainer
# DeepSpeed's operators need OpenMP's library.
RUN ldconfig -p | grep -q libgomp.so.1 \
 || (apt-get update -q && apt-get install -q -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*)
# training.torchCompile and FlexAttention compile in the pods: Triton calls a C compiler. COMPILER=gcc brings it, with 190 MB.
ARG COMPILER=
RUN test -z "$COMPILER" \
 || (apt-get update -q && apt-get install -q -y --no-install-recommends $COMPILER libc6-dev && rm -rf /var/lib/apt/lists/*)
COPY --from=trainer-dependencies /opt/venv /opt/venv
COPY --from=source /opt/luthier /opt/luthier
ARG DS_ACCELERATOR=cuda
ENV PATH=/opt/luthier/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp USER=luthier PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 DS_ACCELERATOR=${DS_ACCELERATOR}
USER 1000:1000
ENTRYPOINT ["python", "-m", "luthier_trainer"]
