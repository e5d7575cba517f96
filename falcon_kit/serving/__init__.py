"""Falcon outside this process: endpoints, deployment settings, GGUF files.

The files, in the order of their imports:

protocol.py    what every protocol has in common, and how failures are named (no torch)
stream.py      an answer as it arrives (no torch)
openai_api.py  OpenAI-compatible servers (no torch)
tgi.py         Text Generation Inference (no torch)
sagemaker.py   SageMaker endpoints (no torch)
endpoint.py    connect(): generate, stream and chat over an endpoint (no torch)
deployment.py  settings of vLLM and of SageMaker's containers (no torch)
gguf.py        export_gguf(): one file for llama.cpp
"""
