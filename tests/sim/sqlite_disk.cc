#include "tests/sim/sqlite_disk.h"

#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "server/jobs/sql_job_store.h"

namespace walsh::sim {

Simulation::Result RunOnSqlite(uint64_t seed) {
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / absl::StrCat("walsh-sim-", getpid(), "-", seed);
  std::filesystem::create_directories(directory);
  const Simulation::Result result =
      Simulation::Run({.seed = seed,
                       .open_disk = [path = (directory / "jobs.db").string()](
                                        const Clock* clock) -> std::unique_ptr<jobs::JobStore> {
                         auto store = jobs::SqlJobStore::OpenSqlite(path, clock);
                         WALSH_CHECK(store.ok());
                         return *std::move(store);
                       },
                       .reopens_disk = true});
  std::filesystem::remove_all(directory);
  return result;
}

}  // namespace walsh::sim
