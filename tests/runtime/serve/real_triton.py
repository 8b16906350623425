"""Asks a real Triton server: started by a test in an environment that has one, prints what it found as JSON.

    python real_triton.py FOLDER BUNDLE... (named plain, classes and text by their order)

The environment needs nvidia-pytriton (for the server's binaries), tritonclient[http,grpc] and accuquant[cpu].
"""

import json
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from accuquant.runtime import Bundle, Pipeline
from accuquant.runtime.serve.triton import Serving, write_repository

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from triton_server import started

BATCH, PREVIEWS = 4, 2
PATIENCE = 600  # seconds
KINDS = {"seed": (np.uint64, "UINT64"), "class": (np.int64, "INT64"), "guidance": (np.float32, "FP32")}


def inputs(library, **wishes):
    made = []
    for name, values in wishes.items():
        dtype, kind = KINDS.get(name, (object, "BYTES"))
        array = np.array(values, dtype).reshape(-1, 1)
        made.append(library.InferInput(name, array.shape, kind))
        made[-1].set_data_from_numpy(array)
    return made


def count_merged(client, model):
    stats = client.get_inference_statistics(model)["model_stats"]
    return sum(s["inference_count"] for s in stats), sum(s["execution_count"] for s in stats)


def over_both(http, grpc, bundle):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate([3, 4, 2**64 - 1]))
    found = []
    for library, address in ((over_http, http), (over_grpc, grpc)):
        client = library.InferenceServerClient(address)
        answer = client.infer("plain", inputs(library, seed=[3, 4, 2**64 - 1]))
        found.append(np.array_equal(answer.as_numpy("picture"), expected))
    body = json.dumps({"inputs": [{"name": "seed", "shape": [1, 1], "datatype": "UINT64", "data": [4]}]}).encode()
    answer = json.load(urlopen(Request(f"http://{http}/v2/models/plain/infer", body)))
    found.append(answer["outputs"][0]["data"] == expected[1].ravel().tolist())
    return found


def strangers(http, bundle, count=32):
    """Requests of one and two pictures at once, each under its own wishes; every one must get its own picture."""
    words = ["red apple", "blue heart", "red heart", "blue apple"]
    wishes = [
        {"seed": [i, i + 500][: 1 + i % 2], "prompt": [words[i % 4]] * (1 + i % 2)}
        | ({"guidance": [1.0 + i / 4] * (1 + i % 2)} if i % 3 else {})
        | ({"negative_prompt": ["blue"] * (1 + i % 2)} if i % 5 == 0 else {})
        for i in range(count)
    ]
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        expected = [
            pipeline.pictures(
                pipeline.generate(
                    w["seed"], prompts=w["prompt"], guidance=w.get("guidance"), unwanted=w.get("negative_prompt", "")
                )
            )
            for w in wishes
        ]

    client = over_http.InferenceServerClient(http, concurrency=count)
    before = count_merged(client, "text")
    waiting = [client.async_infer("text", inputs(over_http, **w)) for w in wishes]
    same = [np.array_equal(one.get_result().as_numpy("picture"), e) for one, e in zip(waiting, expected, strict=True)]
    after = count_merged(client, "text")
    return {
        "requests": count, "same": sum(same), "pictures": after[0] - before[0], "executions": after[1] - before[1],
        "distinct": len({e.tobytes() for e in expected}),
    }  # fmt: skip


def a_bad_one_among_them(http, bundle):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate([1, 2, 3], classes=[0, 1, 2]))
    client = over_http.InferenceServerClient(http, concurrency=8)
    waiting = [
        client.async_infer("classes", inputs(over_http, seed=[s], **{"class": [c]}))
        for s, c in ((1, 0), (7, 99), (2, 1), (3, 2))
    ]
    answers = []
    for one in waiting:
        try:
            answers.append(one.get_result().as_numpy("picture")[0])
        except Exception as error:  # the client's own class
            answers.append(str(error))
    refused = answers.pop(1)
    return {"same": all(map(np.array_equal, answers, expected)), "refused": refused}


def previews(http, grpc, bundle):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate([5]))[0]
    seen = queue.Queue()
    with over_grpc.InferenceServerClient(grpc) as client:
        client.start_stream(lambda result, error: seen.put((result, error)))
        client.async_stream_infer("plain-previews", inputs(over_grpc, seed=[5]), enable_empty_final_response=True)
        steps, last = [], None
        while True:
            result, error = seen.get(timeout=120)
            assert error is None, error
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
            steps.append(int(result.as_numpy("step")[0, 0]))
            last = result.as_numpy("picture")[0]
        client.stop_stream()
    body = json.dumps({"seed": 5}).encode()
    events = urlopen(Request(f"http://{http}/v2/models/plain-previews/generate_stream", body)).read().decode()
    streamed = [json.loads(line[5:]) for line in events.splitlines() if line.startswith("data:")]
    return {
        "steps": steps,
        "same": np.array_equal(last, expected),
        "http_steps": [event["step"] for event in streamed],
        "http_same": streamed[-1]["picture"] == expected.ravel().tolist(),
    }


def reload_under_load(http, grpc, folder, bundle, reloads=3, clients=4):
    """Versions written and loaded while clients go on asking; every request must be answered, and rightly.

    Their patience is long: on a busy machine a picture waits while the next version compiles.
    """
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate(range(8)))
    over = False

    def ask(k):
        client, done = over_http.InferenceServerClient(http, network_timeout=PATIENCE), []
        while not over:
            seed, begun = (k + len(done)) % 8, time.perf_counter()
            try:
                answer = client.infer("plain", inputs(over_http, seed=[seed]))
                right = np.array_equal(answer.as_numpy("picture")[0], expected[seed])
                done.append((right, answer.get_response()["model_version"], time.perf_counter() - begun))
            except Exception as error:  # whatever it is, a request was lost
                done.append((False, str(error), time.perf_counter() - begun))
        return done

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, k) for k in range(clients)]
        # Over HTTP, loading keeps one of the server's threads, and every connection that this thread serves, waiting.
        client = over_grpc.InferenceServerClient(grpc)
        for _ in range(reloads):
            time.sleep(2)
            write_repository(bundle, folder / "repository", Serving("plain", BATCH, threads=1))
            client.load_model("plain", client_timeout=PATIENCE)
        time.sleep(2)
        over = True
        done = [one for answers in asking for one in answers.result()]
    return {
        "requests": len(done),
        "lost": [what for right, what, _ in done if not right],
        "versions": {version: sum(v == version for _, v, _ in done) for version in sorted({v for _, v, _ in done})},
        "longest": max(seconds for *_, seconds in done),
    }


def main():
    folder, names = Path(sys.argv[1]), ("plain", "classes", "text")
    bundles = {name: Bundle(Path(path)) for name, path in zip(names, sys.argv[2:], strict=True)}
    for name, bundle in bundles.items():
        few = 0 if name == "classes" else PREVIEWS
        write_repository(bundle, folder / "repository", Serving(name, BATCH, threads=1, previews=few))
    server = started(sys.executable, folder, folder / "repository")
    http, grpc = server.http, server.grpc
    try:
        print(json.dumps({
            "over_both": over_both(http, grpc, bundles["plain"]),
            "strangers": strangers(http, bundles["text"]),
            "bad_one": a_bad_one_among_them(http, bundles["classes"]),
            "previews": previews(http, grpc, bundles["plain"]),
            "reload": reload_under_load(http, grpc, folder, bundles["plain"]),
        }))  # fmt: skip
    finally:
        server.stop()


if __name__ == "__main__":
    main()
