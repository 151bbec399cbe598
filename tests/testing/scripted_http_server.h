// A server on the loopback that answers each request with the next bytes of a script, whatever is
// asked, and keeps what was: for clients that must live with answers that no real server gives.
//
// Each answer goes out as it is, and its connection is closed after it.
//
// Threads: safe.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace walsh::testing {

class ScriptedHttpServer {
 public:
  // Beyond its end the last answer is repeated.
  explicit ScriptedHttpServer(std::vector<std::string> answers);
  ~ScriptedHttpServer();
  ScriptedHttpServer(const ScriptedHttpServer&) = delete;
  ScriptedHttpServer& operator=(const ScriptedHttpServer&) = delete;

  // An answer of this status with its length.
  static std::string Answer(int status, const std::string& body, const std::string& headers = "");
  // At the end of an answer: after it the connection stays open and nothing comes.
  static constexpr char kHang[] = "\x01";

  std::string url() const;  // http://127.0.0.1:PORT
  // Head and body of each request.
  std::vector<std::string> requests() const;

 private:
  void Serve();
  void Answer(int connection);

  const std::vector<std::string> answers_;
  int listener_ = -1;
  int port_ = 0;
  mutable std::mutex mu_;
  std::vector<std::string> requests_;
  std::vector<int> hanging_;  // of the thread
  std::thread thread_;        // last: it uses the others
};

}  // namespace walsh::testing
