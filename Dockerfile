# The server. The base image brings no GPU driver; the container's runtime does.
FROM python:3.11-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY vidlada vidlada
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve]' \
 && useradd --create-home vidlada

USER vidlada
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vidlada", "serve", "--host", "0.0.0.0"]
