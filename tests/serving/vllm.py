"""vLLM's responses, by the schemas in its source (entrypoints/openai), on a model of this process."""

from falcon_kit.generation.chat import render
from tests.serving.servers import Reply, as_reply, event

MOST = 20


def vllm(falcon):
    """A script with vLLM's responses, by its protocol.py: the generated token stands first among the likeliest."""

    def script(path, body, _):
        if path == "/v1/models":
            return as_reply({"data": [{"id": "falconet-instruct", "owned_by": "vllm", "max_model_len": 2048}]})
        chat = "messages" in body
        if path == "/tokenize":
            given = falcon.tokenizer(render(body["messages"], falcon.chat_format) if chat else body["prompt"])
            tokens = given["input_ids"]
            return as_reply({"count": len(tokens), "max_model_len": 2048, "tokens": tokens, "token_strs": None})
        wanted = body["top_logprobs"] if chat else body["logprobs"]
        if wanted > MOST:
            wrong = f"Requested sample logprobs of {wanted}, which is greater than max allowed: {MOST}"
            error = {"message": wrong, "type": "BadRequestError", "param": "logprobs", "code": 400}
            return Reply([event({"error": error}), b"data: [DONE]\n\n"])  # with HTTP 200
        return Reply(list(events(chat, wanted, body)))

    def events(chat, wanted, body):
        prompt = body["messages"] if chat else body["prompt"]
        given = {name: body[name] for name in ("seed", "temperature", "top_p") if body.get(name) is not None}
        given |= {"top_k": body["top_k"]} if body.get("top_k", -1) > 0 else {}
        stream = falcon.stream(prompt, max_new_tokens=body["max_tokens"], alternatives=wanted, **given)
        for piece in stream:
            name = falcon.tokenizer.decode([piece.token_id])
            top = {name: piece.logprob} | {each.text: each.logprob for each in piece.alternatives}
            choice = {"index": 0, "finish_reason": None, "token_ids": [piece.token_id]}
            yield event({"choices": [choice | (in_chat if chat else in_completion)(piece, name, top, wanted)]})
        reason = {"eos": "stop"}.get(stream.generation.finish_reason, stream.generation.finish_reason)
        yield event({"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": reason}]})
        stats = stream.generation.stats
        yield event(
            {"choices": [], "usage": {"prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.new_tokens}}
        )
        yield b"data: [DONE]\n\n"

    def in_completion(piece, name, top, wanted):
        top = dict(list(top.items())[: wanted + 1])
        lists = {"text_offset": [0], "tokens": [name], "token_logprobs": [piece.logprob], "top_logprobs": [top]}
        return {"text": piece.text, "logprobs": lists}

    def in_chat(piece, name, top, wanted):
        def entry(text, logprob):
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = entry(name, piece.logprob) | {"top_logprobs": [entry(*each) for each in list(top.items())[:wanted]]}
        return {"delta": {"content": piece.text}, "logprobs": {"content": [content]}}

    return script
