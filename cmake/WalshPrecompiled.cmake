# Headers of gRPC, protobuf and GoogleTest, read once: most of what compilers do for the files that include them.
#
# Only where WALSH_PRECOMPILE_HEADERS is set, which is where sanitizers build everything anew: other presets find
# an #include that is missing. A folder whose files use gRPC sets WALSH_USES_GRPC.
option(WALSH_PRECOMPILE_HEADERS "Read the headers of gRPC and GoogleTest once" OFF)

# `ARGN`: what the target links.
function(walsh_precompiled_headers target)
  if(NOT WALSH_PRECOMPILE_HEADERS OR NOT WALSH_USES_GRPC OR NOT "${ARGN}" MATCHES "walsh::(proto|common_grpc|server[a-z_]*|client|client_commands|worker_service)(;|$)")
    return()
  endif()
  target_compile_options(${target} PRIVATE -fpch-preprocess)  # for ccache
  # Compilers want the same options where headers are read and where they are used.
  if(WALSH_TEST_OPTIONS)
    target_precompile_headers(${target} REUSE_FROM walsh_test_headers)
  else()
    target_precompile_headers(${target} REUSE_FROM walsh_headers)
  endif()
endfunction()

function(walsh_add_precompiled_headers)
  if(NOT WALSH_PRECOMPILE_HEADERS)
    return()
  endif()
  file(WRITE ${CMAKE_BINARY_DIR}/generated/no_code.cc "")
  set(headers <grpcpp/grpcpp.h> <absl/status/statusor.h> <absl/synchronization/mutex.h>
      <walsh/internal/v1/worker.grpc.pb.h> <walsh/v1/evaluation.grpc.pb.h> <walsh/v1/generation.grpc.pb.h>
      <walsh/v1/model.grpc.pb.h> <walsh/v1/quantization.grpc.pb.h>
      <functional> <map> <memory> <optional> <string> <thread> <vector>)
  foreach(name walsh_headers walsh_test_headers)
    add_library(${name} STATIC ${CMAKE_BINARY_DIR}/generated/no_code.cc)
    target_link_libraries(${name} PRIVATE walsh_flags walsh::proto)
  endforeach()
  target_precompile_headers(walsh_headers PRIVATE ${headers})
  target_compile_options(walsh_test_headers PRIVATE -O0)
  target_link_libraries(walsh_test_headers PRIVATE GTest::gmock GTest::gtest GTest::gtest_main)
  target_precompile_headers(walsh_test_headers PRIVATE ${headers} <gmock/gmock.h> <gtest/gtest.h>)
endfunction()
