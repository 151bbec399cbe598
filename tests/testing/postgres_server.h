// A PostgreSQL server of a test's own: in a temporary folder, on a socket in it, without TCP.
//
// Its programs are Debian's (package postgresql-15), installed or unpacked by ./run into the cache
// folder. They refuse to run as root; then they run as nobody.
#pragma once

#include <optional>
#include <string>

#include "client/child_process.h"
#include "tests/testing/test_data.h"

namespace walsh::testing {

class PostgresServer {
 public:
  // Whether its programs are there.
  static bool IsInstalled();
  // One for the whole process, as making it takes seconds. It runs, whatever the last test did.
  static PostgresServer& Shared();

  PostgresServer();
  ~PostgresServer();
  PostgresServer(const PostgresServer&) = delete;
  PostgresServer& operator=(const PostgresServer&) = delete;

  // The URI of a new, empty database: a schema, which takes milliseconds.
  std::string NewDatabase();
  void Start();  // returns when it answers
  // Without a word to its clients, and without writing anything: what it has acknowledged it must
  // find again in its log.
  void Crash();

 private:
  std::string Uri() const;

  const TempDir dir_;
  std::string bin_;  // the folder of its programs
  std::optional<client::ChildProcess> process_;
  int n_databases_ = 0;
};

}  // namespace walsh::testing

// In a test or its SetUp.
#define WALSH_REQUIRE_POSTGRES()                                       \
  WALSH_SKIP_OR_FAIL(!::walsh::testing::PostgresServer::IsInstalled(), \
                     "no PostgreSQL (Debian's postgresql-15)")
