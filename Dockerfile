# Two images, `--target cpu` (also what no target means) and `--target cuda`: the page in the browser, the embedded model, and
# every other command of the program. Versions are the pins of requirements.txt; docs/start.md says how to run them.
# What changes seldom comes first, and a layer is built again where what was chosen for it changes: torch, the other packages,
# then the source.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/twig/.cache/huggingface \
    OMP_WAIT_POLICY=passive
RUN useradd --uid 1000 --create-home twig && install --directory --owner twig --group twig /home/twig/.cache /home/twig/.cache/huggingface
WORKDIR /packages
VOLUME /home/twig/.cache/huggingface
EXPOSE 7860
# Any answer but a fault of the server's: the program's other doors have no page at /.
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m --retries=3 CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 7860, timeout=4); c.request('GET', '/'); sys.exit(c.getresponse().status >= 500)"]
CMD ["twigvlm", "web", "--host", "0.0.0.0", "--port", "7860", "--no-browser"]

FROM base AS chosen
COPY pyproject.toml requirements.txt ./
# torch by itself, since where its wheels come from is what tells the images apart; then what the package and its doors ask for.
RUN grep '^torch==' requirements.txt > torch.txt && python -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in ('eval', 'web', 'quant')]; \
print(*project['dependencies'], *sum(extras, []), sep='\n')" > wanted.txt

FROM base AS cpu-packages
COPY --from=chosen /packages/torch.txt ./
RUN pip install --index-url https://download.pytorch.org/whl/cpu -r torch.txt
COPY --from=chosen /packages/wanted.txt /packages/requirements.txt ./
RUN pip install -c requirements.txt -r wanted.txt

FROM base AS cuda-packages
# PyPI's wheels for Linux bring CUDA's libraries along; the driver is the machine's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=chosen /packages/torch.txt ./
RUN pip install -r torch.txt
COPY --from=chosen /packages/wanted.txt /packages/requirements.txt ./
RUN pip install -c requirements.txt -r wanted.txt

FROM base AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY assets assets
COPY checkpoints checkpoints
COPY scripts scripts
COPY twigvlm twigvlm
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM cuda-packages AS cuda
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER 1000:1000
WORKDIR /home/twig

FROM cpu-packages AS cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER 1000:1000
WORKDIR /home/twig
