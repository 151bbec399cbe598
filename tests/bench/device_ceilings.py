#!/usr/bin/env python3
"""device_ceilings.py FOLDER > ceilings.json: what the machine can do, for job_table.py.

Matrix products of 8192³ on normal random data in bf16, TF32 and fp32, a copy on the device, a copy from
pinned memory, and a file of 2 GiB in FOLDER written and read again (from the page cache, with 8 threads). The best
of five runs each. Needs torch and a GPU.
"""

import concurrent.futures
import json
import os
import sys
import time

import torch

N = 8192
FILE_BYTES = 2 << 30
READERS = 8


def best_seconds(run, synchronize=True):
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if synchronize:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def product_rate(dtype, tf32):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a, b = (torch.randn(N, N, device="cuda").to(dtype) for _ in range(2))
    return 2 * N**3 / best_seconds(lambda: a @ b)


def file_rates(folder):
    path = os.path.join(folder, "ceiling.bin")
    piece = os.urandom(1 << 20) * 64

    def write():
        with open(path, "wb") as file:
            for _ in range(FILE_BYTES // len(piece)):
                file.write(piece)

    def read():
        def part(i):
            with open(path, "rb", buffering=0) as file:
                file.seek(i * FILE_BYTES // READERS)
                buffer = bytearray(16 << 20)
                for _ in range(FILE_BYTES // READERS // len(buffer)):
                    file.readinto(buffer)

        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            list(pool.map(part, range(READERS)))

    try:
        return FILE_BYTES / best_seconds(write, False), FILE_BYTES / best_seconds(read, False)
    finally:
        os.remove(path)


def main():
    on_device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(on_device)
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    write, read = file_rates(sys.argv[1])
    json.dump(
        {
            "gpu": torch.cuda.get_device_name(),
            "bf16_flops": product_rate(torch.bfloat16, False),
            "tf32_flops": product_rate(torch.float32, True),
            "fp32_flops": product_rate(torch.float32, False),
            "copy_bytes": 2 * on_device.numel() / best_seconds(lambda: other.copy_(on_device)),
            "pinned_copy_bytes": pinned.numel() / best_seconds(lambda: on_device.copy_(pinned)),
            "file_write_bytes": write,
            "file_read_bytes": read,
        },
        sys.stdout,
        indent=2,
    )


if __name__ == "__main__":
    main()
