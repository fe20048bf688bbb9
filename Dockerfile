# docker build -t knlightning . && docker run --rm knlightning
FROM python:3.12
WORKDIR /knlightning
COPY . .
RUN pip install -e '.[dev]'
CMD ["knl", "fit", "--config", "configs/quickstart.yaml"]
