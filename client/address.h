// Where the service is, when nobody said so.
#pragma once

#include <string>

namespace walsh::client {

inline constexpr char kDefaultAddress[] = "127.0.0.1:50051";

// `server` when it is not empty, else the "grpc" endpoint of the coordinator that runs on
// `data_dir`, else 127.0.0.1:50051.
std::string ResolveAddress(const std::string& server, const std::string& data_dir);

// True for localhost, 127.0.0.0/8 and ::1: the service sees the files that this command sees.
bool IsLoopback(const std::string& address);

}  // namespace walsh::client
