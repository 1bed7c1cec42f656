"""`vllm bench serve ...` again and again: what takes long about it is that Python loads vLLM.

    python -m vllm_orthrus.bench.client --serve '{}'

A question is the arguments of that command; the answer is what it saves.
"""

import json
from pathlib import Path

from vllm_orthrus.bench.process import answer, questions


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for (arguments,) in questions():
        options = parser.parse_args(arguments)
        bench_serve(options)
        answer(json.loads((Path(options.result_dir) / options.result_filename).read_text()))


if __name__ == "__main__":
    main()
