# Every third-party package of the project, found once. All of them are Debian 12 packages, except
# google/rpc/*.proto, which `./run setup` takes from the Python package googleapis-common-protos.

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(nlohmann_json 3.11 CONFIG REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
find_package(SQLite3 REQUIRED)
find_package(CURL 7.86 REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(LIBPQ REQUIRED IMPORTED_TARGET libpq)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
find_path(WALSH_CIVETWEB_INCLUDE civetweb.h REQUIRED)
find_library(WALSH_CIVETWEB_LIBRARY civetweb REQUIRED)
find_program(WALSH_GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)

# The folder that holds google/rpc/status.proto.
find_path(WALSH_GOOGLEAPIS_DIR google/rpc/status.proto
  HINTS $ENV{WALSH_GOOGLEAPIS_DIR} $ENV{WALSH_CACHE_DIR}/googleapis
        $ENV{XDG_CACHE_HOME}/walsh/googleapis $ENV{HOME}/.cache/walsh/googleapis
  NO_DEFAULT_PATH)
if(NOT WALSH_GOOGLEAPIS_DIR)
  message(FATAL_ERROR "google/rpc/status.proto was not found: run './run setup' first, "
                      "or set WALSH_GOOGLEAPIS_DIR to a folder that holds google/rpc/")
endif()

if(WALSH_BUILD_TESTS OR WALSH_BUILD_BENCH OR WALSH_BUILD_FUZZERS)
  find_package(GTest CONFIG REQUIRED)
endif()
if(WALSH_BUILD_BENCH)
  find_package(benchmark CONFIG REQUIRED)
endif()
