// A simulation whose disk is the real SQLite store, in a file under $TMPDIR that goes afterwards.
#pragma once

#include <cstdint>

#include "tests/sim/simulation.h"

namespace walsh::sim {

Simulation::Result RunOnSqlite(uint64_t seed);

}  // namespace walsh::sim
