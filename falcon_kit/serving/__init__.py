"""Falcon outside this process: endpoints, deployment settings, GGUF files.

The files, in the order of their imports:

connection.py  the address, the key and the HTTP client (no torch)
failures.py    the exception for each failure (no torch)
protocol.py    what all protocols share: requests, responses, retries (no torch)
stream.py      one response while it is received (no torch)
openai_api.py  OpenAI-compatible servers (no torch)
echo.py        log-probabilities of a prompt (no torch)
tgi.py         Text Generation Inference (no torch)
sagemaker.py   SageMaker endpoints (no torch)
replicas.py    several servers of one model as one (no torch)
endpoint.py    connect(): generate, stream and chat over an endpoint (no torch)
tgi_server.py  a server of TGI's protocol on loopback, to try a client
deployment.py  settings of vLLM and of SageMaker's containers (no torch)
gguf.py        export_gguf(): one file for llama.cpp
"""
