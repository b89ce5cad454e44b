"""Play scenarios by hand: `python -m tests.lab.contract.play [-v VARIANT]… [PART OF A SCENARIO'S NAME]…`."""

import argparse
import collections
import time

from tests.lab.contract import book, playing, scenarios, variants


def main() -> None:
    """Play what is asked for and print what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-v", "--variant", action="append", choices=variants.VARIANTS)
    parser.add_argument(
        "--all", action="store_true", help="every scenario in every variant, whatever it names"
    )
    parser.add_argument("-c", "--client", action="append", choices=[str(one) for one in book.CLIENTS])
    parser.add_argument("scenario", nargs="*")
    arguments = parser.parse_args()
    clients = [one for one in book.CLIENTS if str(one) in arguments.client] if arguments.client else None
    with playing.Player(scenarios.whole()) as player:
        for name in arguments.variant or variants.VARIANTS:
            chosen = [
                one
                for one in player.scenarios
                if (name == "plain" or arguments.all or name in one.variants)
                and (not arguments.scenario or any(part in one.name for part in arguments.scenario))
            ]
            began = time.monotonic()
            player.start(variants.VARIANTS[name])
            started = time.monotonic()
            found = player.play(chosen, clients)
            ended = time.monotonic()
            mismatches = [one for several in found.values() for one in several]
            for one in mismatches:
                print(one)
            groups = collections.Counter((one.client, one.target.split()[0], one.why) for one in mismatches)
            print(
                f"=== {name}: {len(chosen)} scenarios, {sum(map(bool, found.values()))} not as expected, "
                f"{len(mismatches)} probes; start {started - began:.1f} s, played {ended - started:.1f} s"
            )
            for group, count in groups.most_common():
                print(f"{count:6} {' | '.join(group)}")


if __name__ == "__main__":
    main()
