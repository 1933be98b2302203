"""The server as a command, and on Ray with two replicas: processes that are told to stop, or are killed."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving_helpers import free_port, served, wait_for
from tiny_models import save_with_tokenizer

pytestmark = pytest.mark.slow

LONG = {"prompt": "The quick", "max_tokens": 1500, "num_diffusion_steps": "max", "logit_bias": {"0": -100}}
SHORT_GRACE = "import eso_lm.serving_app as app; app.GRACE_SECONDS = 0.5; from eso_lm.serve import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_with_tokenizer(path, max_position_embeddings=2048)
    return path


def ask_until_told_to_stop(url: str, process: subprocess.Popen) -> list[httpx.Response]:
    """The answers of four long requests, of which two stream, to a server that is told to stop meanwhile."""
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(httpx.post, f"{url}/v1/completions", json=LONG | {"stream": index % 2 == 0}, timeout=60)
            for index in range(4)
        ]
        while "eso_active 4" not in httpx.get(f"{url}/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        return [answer.result() for answer in answers]


def test_sigterm_lets_what_is_under_way_be_finished(folder):
    with served(folder, "-m", "eso_lm.serve") as (url, process):
        answers = ask_until_told_to_stop(url, process)
        for index, answer in enumerate(answers):
            assert answer.status_code == 200
            assert ('"error"' in answer.text) is False
            if index % 2 == 0:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["usage"]["completion_tokens"] == 1500
        process.wait(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again, once all is done


def test_what_takes_too_long_after_sigterm_is_answered_with_an_error(folder):
    with served(folder, "-c", SHORT_GRACE) as (url, process):
        answers = ask_until_told_to_stop(url, process)
        for index, answer in enumerate(answers):
            assert answer.status_code == (200 if index % 2 == 0 else 503)
            assert "The request could not be finished" in answer.text
        process.wait(timeout=30)


def test_the_command_says_what_it_cannot_serve():
    command = [sys.executable, "-m", "eso_lm.serve"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert "name the model to serve" in re.sub(r"[\s│]+", " ", result.stdout + result.stderr)


def test_two_replicas_on_ray(folder, monkeypatch):
    """Both answer; one of them is killed, and no request is lost that its client sends again; a dataset is written."""
    ray = pytest.importorskip("ray")
    from ray import data, serve

    from eso_lm.serving_ray import Deployment, EsoPredictor, build, load

    source = str(Path(sys.modules["eso_lm"].__file__).parents[0])
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(source).parent)]))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    port = free_port()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        arguments = Deployment(
            model=str(folder), name="tiny", min_replicas=2, max_replicas=2, max_requests=8, num_cpus=0.5
        )
        serve.run(build(arguments), name="eso", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        wait_for(url)

        model, tokenizer = load(str(folder))
        expected = model.generate_batch([tokenizer("The quick")["input_ids"]] * 24, seed=0, max_new_tokens=20)
        expected = [tokenizer.decode(one.generated_tokens, skip_special_tokens=True) for one in expected.values()]

        def ask(index: int) -> str:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=8) as client:
                settings = {"prompt": "The quick", "seed": index, "max_tokens": 20}
                return client.completions.create(model="tiny", **settings).choices[0].text

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(24))) == expected
            replicas = [
                actor for actor in ray.util.list_named_actors(all_namespaces=True) if "eso#eso" in actor["name"]
            ]
            assert len(replicas) == 2
            answers = [pool.submit(ask, index) for index in range(24)]
            ray.kill(ray.get_actor(**replicas[0]), no_restart=True)
            assert [answer.result() for answer in answers] == expected
        bad = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "alpha_0": 7})
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "alpha_0"

        data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([{"prompt": "The quick", "seed": seed} for seed in range(10)])
        written = rows.map_batches(
            EsoPredictor,
            fn_constructor_kwargs={"model": str(folder), "max_new_tokens": 20},
            compute=data.ActorPoolStrategy(size=2),
            batch_size=3,
            num_cpus=0.5,
        ).take_all()
        assert {row["seed"]: row["text"] for row in written} == dict(enumerate(expected[:10]))
    finally:
        serve.shutdown()
        ray.shutdown()
