"""Falcon outside this process: endpoints, local servers, deployment settings, GGUF files.

The files, in the order of their imports:

background.py    the thread in which all requests run (no torch)
connection.py    the address, the key and the HTTP client (no torch)
failures.py      the exception for each failure, and safe reading (no torch)
protocol.py      what all protocols share: requests, responses, retries (no torch)
stream.py        one response while it is received (no torch)
chunks.py        what one chunk of an OpenAI-compatible server adds (no torch)
openai_api.py    OpenAI-compatible servers (no torch)
echo.py          log-probabilities of a prompt (no torch)
tgi.py           Text Generation Inference (no torch)
sagemaker.py     SageMaker endpoints (no torch)
replicas.py      one server, or several of one model as one (no torch)
endpoint.py      connect(): generate, stream and chat over an endpoint (no torch)
tgi_server.py    a server of TGI's protocol on loopback, to try a client
deployment.py    settings of vLLM and of SageMaker's containers (no torch)
ggml.py          llama.cpp's own quantiser (no torch)
gguf_kinds.py    the kinds of a quantised GGUF file, as llama-quantize chooses them (no torch)
file_plan.py     the memory plan of llama.cpp, by the tensors of its file (no torch)
gguf.py          export_gguf(): one file for llama.cpp
supervisor.py    a program that runs a server, and ends it with the process that started it (no torch)
local_process.py a server in a process of its own (no torch)
llama_server.py  a program that runs llama.cpp's server from xllamacpp (no torch)
engines.py       vLLM, llama.cpp and `transformers serve`: their command lines (no torch)
source.py        the model that serve() is given, as the files that a server reads
serve.py         serve(): a Falcon on a server of this machine
"""
