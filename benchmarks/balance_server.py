"""A slow server: it answers as the lab's own does, but each question only after a while.

    python3 balance_server.py NAME PORT DELAY_MS

Says `ready` once it listens. In the standard library alone, since it runs in a pod of the lab.
"""

import asyncio
import sys


async def main(name: str, port: int, delay_s: float) -> None:
    """Serve until killed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readline():
                await asyncio.sleep(delay_s)
                host, number = writer.get_extra_info("peername")[:2]
                writer.write(f"{name} {host} {number}\n".encode())
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", port, backlog=1024)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1e3))
