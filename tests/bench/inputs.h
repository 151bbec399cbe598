// What the benchmarks run on when their command line names nothing.
#pragma once

#include <string>

namespace walsh::bench {

// SmolLM2-135M-Instruct.Q4_1.gguf: $WALSH_SMOLLM2, else where `./run fetch-model` puts it; empty
// when it is not there.
std::string FindSource();
// The artifact to serve: $WALSH_BENCH_MODEL, else the one that `./run bench` makes in the cache
// folder; empty when it is not there.
std::string FindArtifact();

// $WALSH_BENCH_THREADS, else what the machine grants.
int DefaultThreads();

}  // namespace walsh::bench
