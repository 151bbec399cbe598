#include "tests/testing/postgres_server.h"

#include <libpq-fe.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/publish.h"
#include "server/jobs/postgres.h"
#include "tests/testing/wait.h"

namespace walsh::testing {
namespace {

constexpr uid_t kNobody = 65534;
constexpr char kBin[] = "/usr/lib/postgresql/15/bin";

// The folder that has what the Debian package has beneath /; empty: it is installed.
std::optional<std::string> Root() {
  const char* cache = std::getenv("WALSH_CACHE_DIR");
  const std::string unpacked = std::string(cache == nullptr ? "" : cache) + "/postgresql-15";
  for (const std::string& root : {std::string(), unpacked}) {
    if (std::filesystem::exists(root + kBin + "/postgres")) return root;
  }
  return std::nullopt;
}

client::SpawnOptions Command(const std::string& program, const std::vector<std::string>& arguments,
                             const std::string& log) {
  client::SpawnOptions options;
  if (geteuid() == 0) {
    // The capability is for the folders on the way to the data, which may be root's alone.
    options.argv = {"/usr/bin/setpriv",
                    "--reuid=65534",
                    "--regid=65534",
                    "--clear-groups",
                    "--inh-caps=+dac_override",
                    "--ambient-caps=+dac_override",
                    "--pdeathsig=QUIT"};
  }
  options.argv.push_back(program);
  options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
  options.stdout_path = options.stderr_path = log;
  return options;
}

}  // namespace

bool PostgresServer::IsInstalled() { return Root().has_value(); }

PostgresServer& PostgresServer::Shared() {
  static PostgresServer server;
  server.Start();
  return server;
}

PostgresServer::PostgresServer() : bin_(*Root() + kBin) {
  if (geteuid() == 0 && !Root()->empty()) {
    // They refuse to start in a folder that they may pass by a capability only.
    std::filesystem::copy(
        *Root() + "/usr", dir_ / "usr",
        std::filesystem::copy_options::recursive | std::filesystem::copy_options::copy_symlinks);
    bin_ = dir_.path() + kBin;
  }
  const std::string data = dir_ / "data";
  WALSH_CHECK(MakeDirectories(data).ok());
  if (geteuid() == 0) {
    for (const std::string& dir : {dir_.path(), data}) {
      WALSH_CHECK_EQ(chown(dir.c_str(), kNobody, kNobody), 0);
    }
  }
  auto made = client::RunCommand(Command(bin_ + "/initdb",
                                         {"-D", data, "-U", "walsh", "-A", "trust", "-E", "UTF8",
                                          "--locale=C.UTF-8", "--no-sync", "--wal-segsize=1"},
                                         ""),
                                 "", absl::Minutes(1));
  WALSH_CHECK(made.ok() && made->exit_code == 0);
  Start();
}

PostgresServer::~PostgresServer() { Crash(); }

void PostgresServer::Start() {
  if (process_.has_value() && !process_->Poll().has_value()) return;
  // Not synced: what a process wrote the system keeps, however the process ends.
  auto process = client::ChildProcess::Spawn(
      Command(bin_ + "/postgres",
              {"-D", dir_ / "data", "-k", dir_.path(), "-c", "listen_addresses=", "-c", "fsync=off",
               "-c", "jit=off", "-c", "max_connections=60"},
              dir_ / "log"));
  WALSH_CHECK(process.ok());
  process_ = *std::move(process);
  WALSH_CHECK(WaitUntil([&] { return PQping(Uri().c_str()) == PQPING_OK; }));
}

void PostgresServer::Crash() {
  process_->Signal(SIGQUIT);
  WALSH_CHECK(process_->Wait(absl::Minutes(1)).has_value());
}

std::string PostgresServer::Uri() const { return "postgres://walsh@/postgres?host=" + dir_.path(); }

std::string PostgresServer::NewDatabase() {
  const std::string name = "test" + std::to_string(++n_databases_);
  auto connection = jobs::PostgresConnection::Open(Uri());
  WALSH_CHECK(connection.ok());
  WALSH_CHECK((*connection)->Execute("CREATE SCHEMA " + name).ok());
  return Uri() + "&options=-csearch_path%3D" + name;
}

}  // namespace walsh::testing
