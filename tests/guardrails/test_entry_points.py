"""Guardrails passed to every method that generates: local, in several processes, on a server, in the playground."""

import signal
from types import SimpleNamespace

import pytest

import falcon_kit as fk
from falcon_kit.generation.text import Generation, Piece, Stats
from falcon_kit.parallel.launching import ParallelFalcon
from falcon_kit.playground.state import Session
from tests.playground.typist import Typist
from tests.serving.servers import Reply, answering, event, scripted

KEY = "AKIAIOSFODNN7EXAMPLE"
CLEAN = (" Giraffes", " eat", " lea", "ves. They", " are tall.")
LEAKING = (" The key", " is ", "AKIA", "IOSFODN", "N7EXAM", "PLE", " here.", *(" And so on",) * 12)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do giraffes eat?"}]
GUARD = fk.guardrails()


class Local:
    """A Falcon that is made to generate certain texts, one for each row."""

    def __init__(self, instruct, server):
        self.falcon, self.started, self.steps = instruct, False, 0

    def scripts(self, *rows):
        tokens = [self.falcon.tokenizer.encode("".join(row)) for row in rows]
        begin = {}

        def allowed(row, ids):
            self.started, self.steps = True, self.steps + 1
            left = tokens[row][len(ids) - begin.setdefault(row, len(ids)) :]
            return left[:1] or [self.falcon.tokenizer.eos_token_id]

        self.steps = 0
        return {"prefix_allowed_tokens_fn": allowed}

    def stopped(self):
        return self.steps < 50


class Parallel:
    """A ParallelFalcon whose one rank sends certain pieces."""

    def __init__(self, instruct, server):
        parts = (instruct.tokenizer, instruct.spec, instruct.plan, instruct.chat_format, "as a test needs it")
        self.workers = ScriptedRank()
        self.falcon = ParallelFalcon(self.workers, "falconet-instruct", *parts)

    def scripts(self, *rows):
        self.workers.rows, self.workers.sent = rows, 0
        return {}

    @property
    def started(self):
        return self.workers.requests > 0

    def stopped(self):
        return self.workers.sent < 15


class ScriptedRank:
    """Takes requests as a process of tensor parallelism does."""

    processes, closed = (None,), False

    def __init__(self):
        self.rows, self.requests, self.sent, self.messages, self.number = (), 0, 0, iter(()), None

    def send(self, message, rank=None):
        if "call" in message and message["number"] != self.number:  # a request that is cancelled is sent again
            self.requests += 1
            self.going = True
            self.number = message["number"]
            self.messages = self.answer(message["call"] == "stream")
        else:
            self.going = message.get("go", False)

    def receive(self, timeout):
        return 0, {"number": self.number, **next(self.messages)}

    def answer(self, streams):
        texts = ["".join(row) for row in self.rows]
        if streams:
            shown = []
            for word in self.rows[0]:
                if not self.going:
                    break
                shown.append(word)
                self.sent += 1
                yield {"piece": vars(Piece(word, 1, -1.0))}
            texts = ["".join(shown)]
        stats = vars(Stats(1, 1, 1, 0.1, 0.2, 0))
        rows = [vars(Generation("", text, (), None, "eos" if self.going else "cancelled", stats)) for text in texts]
        yield {"done": {"rank": 0, "device": "cpu", "weight_bytes": 0, "cache_bytes": 0, "generations": rows}}


class Served:
    """An endpoint whose server sends certain chunks, one text for each request."""

    def __init__(self, instruct, server):
        self.rows, self.server = [], server
        server.script = self.script(answering(Reply()))
        server.requests.clear()
        self.falcon = fk.connect(f"{server.address}/v1")

    def script(self, listing):
        def reply(path, body, headers):
            if not path.endswith("completions"):
                return listing(path, body, headers)
            prompts = ["one", "two", "three"]
            row = prompts.index(body["prompt"]) if body.get("prompt") in prompts else 0
            return Reply(list(self.chunks(self.rows[row])))

        return reply

    def chunks(self, words):
        for number, word in enumerate(words, 1):
            finish = "stop" if number == len(words) else None
            delta = {"index": 0, "text": word, "delta": {"content": word}, "finish_reason": finish}
            yield event({"choices": [delta]})

    def scripts(self, *rows):
        self.rows = rows
        return {}

    @property
    def started(self):
        return any(path.endswith("completions") for path, _, _ in self.server.requests)

    def stopped(self):
        return True  # tests/serving/test_stream.py: closing a stream closes the connection


SUBJECTS = {"local": Local, "parallel": Parallel, "endpoint": Served}


@pytest.fixture(scope="module")
def server():
    with scripted(answering(Reply())) as server:
        yield server


@pytest.fixture(params=SUBJECTS)
def subject(request, instruct, server):
    return SUBJECTS[request.param](instruct, server)


def generate(falcon, prompt, **settings):
    return falcon.generate(prompt, **settings).text


def chat(falcon, prompt, **settings):
    return falcon.chat([CHAT[0], {"role": "user", "content": prompt}], **settings).text


def stream(falcon, prompt, **settings):
    shown = falcon.stream(prompt, **settings)
    text = "".join(piece.text for piece in shown)
    assert shown.generation.text == text
    return text


def stream_of_a_chat(falcon, prompt, **settings):
    return stream(falcon, [CHAT[0], {"role": "user", "content": prompt}], **settings)


each_call = pytest.mark.parametrize("call", [generate, chat, stream, stream_of_a_chat])


def holds_no_text(error, text):
    """Whether neither the error, nor what it has, nor an error behind it contains the text."""
    chain = [error]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    return not any(text in f"{each!s} {each!r} {vars(each)!r}" for each in chain[:-1])


@each_call
def test_a_blocked_prompt_reaches_no_model(subject, call):
    settings = subject.scripts(CLEAN)
    with pytest.raises(fk.Blocked, match="blocked by secrets: an AWS access key id") as blocked:
        call(subject.falcon, f"My key is {KEY}.", guardrails=GUARD, **settings)
    assert not subject.started
    assert blocked.value.verdict.where == "prompt"
    assert holds_no_text(blocked.value, KEY)


@each_call
def test_a_blocked_text_is_not_returned(subject, call):
    settings = subject.scripts(LEAKING)
    with pytest.raises(fk.Blocked, match="output blocked by secrets: an AWS access key id") as blocked:
        call(subject.falcon, "Hello", guardrails=GUARD, **settings)
    assert blocked.value.verdict.where == "output"
    assert holds_no_text(blocked.value, KEY[:8])


@each_call
def test_a_clean_text_is_the_one_without_guardrails(subject, call):
    plain = call(subject.falcon, "Hello", **subject.scripts(CLEAN))
    assert call(subject.falcon, "Hello", guardrails=GUARD, **subject.scripts(CLEAN)) == plain
    assert plain.strip() == "Giraffes eat leaves. They are tall."


def test_a_blocked_stream_shows_nothing_of_a_secret_in_pieces_and_stops_the_model(subject):
    shown, stream = [], subject.falcon.stream("Hello", guardrails=GUARD, **subject.scripts(LEAKING))
    with pytest.raises(fk.Blocked, match="output blocked by secrets"):
        shown.extend(piece.text for piece in stream)
    assert "".join(shown).strip() in ("The key", "The key is")
    assert subject.stopped()
    assert list(stream) == []
    with pytest.raises(fk.Blocked):
        _ = stream.generation
    assert generate(subject.falcon, "Hello", guardrails=GUARD, **subject.scripts(CLEAN)).startswith(" Giraffes")


def test_a_closed_stream_has_only_text_that_passed(subject):
    stream = subject.falcon.stream("Hello", guardrails=GUARD, **subject.scripts(CLEAN))
    assert "Giraffes".startswith(next(stream).text.strip())
    stream.close()
    assert list(stream) == []
    assert "".join(CLEAN).startswith(stream.generation.text)
    leaking = subject.falcon.stream("Hello", guardrails=GUARD, **subject.scripts((KEY, " here", " and on")))
    leaking.close()
    assert KEY not in repr(leaking)


@each_call
@pytest.mark.parametrize("where", ["prompt", "output"])
def test_a_check_of_your_own_that_fails_blocks_the_text(subject, call, where):
    def broken(text):
        if (text == "Hello") if where == "prompt" else "Giraffes" in text:
            raise KeyError(text)

    guard = fk.guardrails(custom=broken)
    with pytest.raises(fk.Blocked, match="the check broken failed: KeyError") as blocked:
        call(subject.falcon, "Hello", guardrails=guard, **subject.scripts(CLEAN))
    assert blocked.value.verdict.where == where
    assert holds_no_text(blocked.value, "Giraffes")


@each_call
def test_ctrl_c_in_a_check_stops_the_model_and_leaves_everything_usable(subject, call):
    guard = fk.guardrails(custom=lambda text: "Giraffes" in text and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        call(subject.falcon, "Hello", guardrails=guard, **subject.scripts(CLEAN))
    assert call(subject.falcon, "Hello", guardrails=GUARD, **subject.scripts(CLEAN)).strip().startswith("Giraffes")


def test_each_row_of_a_batch_is_checked_and_named(subject):
    prompts = ["one", "two", "three"]
    with pytest.raises(fk.Blocked, match="prompt 2 of 3 blocked by secrets") as blocked:
        subject.falcon.generate(["one", KEY, "three"], guardrails=GUARD, **subject.scripts(CLEAN))
    assert (blocked.value.label, subject.started) == ("prompt 2 of 3", False)
    with pytest.raises(fk.Blocked, match="output 3 of 3 blocked by secrets"):
        subject.falcon.generate(prompts, guardrails=GUARD, **subject.scripts(CLEAN, CLEAN, LEAKING))
    texts = subject.falcon.generate(prompts, guardrails=GUARD, **subject.scripts(CLEAN, CLEAN, CLEAN))
    assert len(texts) == 3


def test_every_message_of_a_conversation_is_checked(subject):
    talk = [*CHAT, {"role": "assistant", "content": f"Keep {KEY}."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(fk.Blocked, match="message 3 of 4 blocked by secrets"):
        subject.falcon.chat(talk, guardrails=GUARD, **subject.scripts(CLEAN))
    marked = [{"role": "user", "content": "What is <|endoftext|>?"}]
    with pytest.raises(fk.Blocked, match="message blocked by control_tokens"):
        subject.falcon.chat(marked, guardrails=GUARD, **subject.scripts(CLEAN))


def test_a_prompt_of_token_ids_is_read_as_the_text_that_it_is(instruct):
    ids = instruct.tokenizer.encode(f"My key is {KEY}.")
    with pytest.raises(fk.Blocked, match="prompt blocked by secrets"):
        instruct.generate(ids, guardrails=GUARD)
    with pytest.raises(fk.Blocked, match="a special token of Falcon"):
        instruct.generate([23, 11, 40], guardrails=GUARD)
    with pytest.raises(ValueError, match="-1 is no token id"):
        instruct.generate([23, -1], guardrails=GUARD)


def test_an_endpoint_without_its_tokenizer_refuses_token_ids(instruct, server):
    with pytest.raises(ValueError, match="give the prompt as a text"):
        Served(instruct, server).falcon.generate([1, 2], guardrails=GUARD)


@each_call
def test_what_is_no_guardrails_is_refused_and_the_advice_works(subject, call):
    settings = subject.scripts(CLEAN)
    with pytest.raises(TypeError, match=r"fk.guardrails\(custom=...\) takes a function"):
        call(subject.falcon, "Hello", guardrails=str.isupper, **settings)
    assert call(subject.falcon, "Hello", guardrails=fk.guardrails(custom=str.isupper), **settings)


@pytest.mark.parametrize("text", ["Half", f" {KEY} "])
@pytest.mark.parametrize("call", [generate, chat, stream])
def test_the_text_of_an_answer_that_breaks_off_is_checked_too(server, text, call):
    half = event({"choices": [{"index": 0, "text": text, "delta": {"content": text}, "finish_reason": None}]})
    server.script = answering(Reply([half], cut=True))
    falcon = fk.connect(f"{server.address}/v1")
    with pytest.raises(fk.Blocked if KEY in text else fk.IncompleteAnswer) as error:
        call(falcon, "Hello", guardrails=GUARD)
    assert holds_no_text(error.value, KEY)


@pytest.mark.parametrize(("word", "expected"), [("Giraffes", fk.Blocked), ("lions", MemoryError)])
@each_call
def test_each_text_that_ends_where_memory_runs_out_is_checked_too(instruct, call, word, expected):
    allowed = Local(instruct, None).scripts(CLEAN)["prefix_allowed_tokens_fn"]

    def full(row, ids):
        if (tokens := allowed(row, ids)) == [instruct.tokenizer.eos_token_id]:
            raise MemoryError
        return tokens

    with pytest.raises(expected) as error:
        call(instruct, "Hello", guardrails=fk.guardrails(blocked_words=[word]), prefix_allowed_tokens_fn=full)
    assert holds_no_text(error.value, "Giraffes") == (expected is fk.Blocked)


# The playground


def session(words, guard):
    typist = Typist(*words)
    return Session(typist, guardrails=guard), typist


def test_the_playground_refuses_a_prompt_with_the_reason_and_keeps_the_words_to_itself():
    opened, typist = session(CLEAN, GUARD)
    with pytest.raises(ValueError, match="the guardrails refuse this text: secrets: an AWS access key id"):
        opened.generate(f"My key is {KEY}.")
    assert (typist.asked, opened.history) == ([], [])


@pytest.mark.parametrize("changes", [{"system": f"Say {KEY}"}, {}])
def test_the_playground_checks_all_messages_of_a_conversation(changes):
    opened, typist = session(LEAKING, None)
    opened.switch("chat")
    if not changes:
        opened.generate("Hello")
    vars(opened).update(changes)
    opened.guard(True)
    with pytest.raises(ValueError, match="the guardrails refuse this text: secrets"):
        opened.generate("And?")
    assert len(typist.asked) == (not changes)


def test_the_playground_shows_the_reason_in_place_of_blocked_words_and_stops_the_model():
    opened, typist = session(LEAKING, GUARD)
    shown = []
    opened.listeners.append(lambda event: shown.append(opened.turns[0].answers[0].text))
    answer = opened.generate("Hello").answers[0]
    assert (answer.text, answer.ending) == (" The key is ", "refused")
    assert answer.reason.startswith("secrets: an AWS access key id (characters 12 to 32)")
    assert answer.reason in opened.turns[0]._repr_html_()
    assert {*shown} <= {"", " The key", " The key is "}
    assert typist.closed.wait(5)


def test_the_playground_shows_a_clean_text_as_it_is():
    opened, _ = session(CLEAN, GUARD)
    assert opened.generate("Hello").answers[0].text == "".join(CLEAN)


def test_a_check_that_fails_in_the_playground_refuses_the_answer():
    def broken(text):
        if "Giraffes" in text:
            raise KeyError(text)

    opened, _ = session(CLEAN, fk.guardrails(custom=broken))
    answer = opened.generate("Hello").answers[0]
    assert (answer.text, answer.ending) == ("", "refused")
    assert "the check broken failed: KeyError" in answer.reason


@pytest.mark.parametrize("guard", [None, GUARD])
def test_the_switch_is_off_unless_guardrails_are_given_and_is_saved(tmp_path, guard):
    opened, _ = session(CLEAN, guard)
    assert opened.guarded == (guard is not None)
    opened.generate("Hello")
    fresh, _ = session(CLEAN, None)
    fresh.load(opened.save(tmp_path / "session.json"))
    assert fresh.guarded == opened.guarded


def test_a_file_does_not_turn_guardrails_off(tmp_path):
    unguarded, _ = session(CLEAN, None)
    unguarded.generate("Hello")
    opened, _ = session(CLEAN, GUARD)
    opened.load(unguarded.save(tmp_path / "session.json"))
    assert (opened.guarded, opened.guardrails) == (True, GUARD)


def test_the_switch_turns_guardrails_off_and_on():
    opened, _ = session(LEAKING, GUARD)
    opened.guard(False)
    assert KEY in opened.generate("Hello").answers[0].text
    opened.guard(True)
    assert opened.generate("Hello").answers[0].ending == "refused"


def test_the_widget_shows_the_switch_and_obeys_it():
    widget = fk.playground(Typist(*CLEAN))
    sent = []
    widget.send = sent.append
    for on in (True, False):
        widget._run("guard", {"on": on})
        assert [each["guarded"] for each in sent if each["type"] == "state"][-1] is on
        assert SimpleNamespace(**vars(widget.session)).guarded is on
    assert 'role: "switch"' in widget._esm
    assert '"Guardrails")' in widget._esm
