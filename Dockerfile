# docker build -t invirtuo . && docker run --rm -v "$PWD:/work" invirtuo demo --out demo
# --build-arg PIP_EXTRA_INDEX_URL=ADDRESS of an index with CPU builds of torch makes the image several GB smaller.
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/invirtuo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt .
WORKDIR /work
ENTRYPOINT ["invirtuo"]
