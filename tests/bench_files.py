"""Open a dataset of 200,000 clips: links to some hundred, decoded by the first of two starts.

    python tests/bench_files.py [--clips 200000]

Prints the seconds of each start and the memory at its peak.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data

OPEN = """
import sys, time
import data
begin = time.perf_counter()
dataset = data.TalkingHeads(sys.argv[1], 64, cache=sys.argv[2])
seconds = time.perf_counter() - begin
print(f"{len(dataset.clips)} clips of {len(dataset.people)} people: {seconds:.1f} s")
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder, "synthetic")
        data.make_synthetic(few, num_public=40, num_clients=1, num_unseen=1, size=64, seed=0)
        sources = sorted(few.glob("*/*.mp4"))
        people = Path(folder, "people")
        for i in range(args.clips):
            person = people / f"p{i // 10:05d}"
            person.mkdir(parents=True, exist_ok=True)
            # Ten different clips a person, of sources that others share.
            (person / f"{i % 10:05d}.mp4").symlink_to(sources[(i // 10 * 7 + i) % len(sources)])
        for start in ("cold", "warm"):
            command = [sys.executable, "-c", OPEN, str(people), f"{folder}/cache"]
            print(f"{start} start,", end=" ", flush=True)
            subprocess.run(command, cwd=ROOT, check=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"memory at its peak: {memory:.2f} GB")


if __name__ == "__main__":
    main()
