# walsh_library, walsh_executable, walsh_test, walsh_bench: targets that carry the project's flags.
# Third-party headers are SYSTEM, so the warnings concern our code only.

set(WALSH_WARNINGS -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
    -Wnon-virtual-dtor -Wold-style-cast -Wimplicit-fallthrough -Wno-missing-field-initializers)
# -Wno-sign-conversion: indices into std containers would need a cast at every use.
# -Wno-missing-field-initializers: designated initialisers leave the other members at their defaults.

add_library(walsh_flags INTERFACE)
target_include_directories(walsh_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(walsh_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:${WALSH_WARNINGS}>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(WALSH_WERROR)
  target_compile_options(walsh_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
target_compile_options(walsh_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer -fstack-protector-strong>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2>)
target_compile_definitions(walsh_flags INTERFACE _GLIBCXX_ASSERTIONS)
target_link_options(walsh_flags INTERFACE -Wl,-z,relro,-z,now)

if(WALSH_SANITIZE)
  # The libraries are not instrumented; the flags must reach every target of ours, generated code too.
  add_compile_options(-fsanitize=${WALSH_SANITIZE} -fno-sanitize-recover=all -g1)
  add_link_options(-fsanitize=${WALSH_SANITIZE})
endif()
if(WALSH_SANITIZE STREQUAL "thread")
  set(WALSH_TSAN_WRAPPED  # tests/testing/tsan_absl.cc
    _ZN4absl7debian35Mutex4LockEv
    _ZN4absl7debian35Mutex6UnlockEv
    _ZN4absl7debian37CondVar4WaitEPNS0_5MutexE
    _ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE
    _ZN4absl7debian312Notification6NotifyEv
    _ZNK4absl7debian312Notification19WaitForNotificationEv)
endif()

# walsh_library(NAME worker_io SRCS a.cc HDRS a.h DEPS walsh::common)  ->  target walsh::worker_io
function(walsh_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;HDRS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(walsh_${ARG_NAME} STATIC ${ARG_SRCS} ${ARG_HDRS})
    target_link_libraries(walsh_${ARG_NAME} PUBLIC walsh_flags ${ARG_DEPS})
    walsh_precompiled_headers(walsh_${ARG_NAME} ${ARG_DEPS})
  else()
    add_library(walsh_${ARG_NAME} INTERFACE)
    target_link_libraries(walsh_${ARG_NAME} INTERFACE walsh_flags ${ARG_DEPS})
  endif()
  add_library(walsh::${ARG_NAME} ALIAS walsh_${ARG_NAME})
endfunction()

# walsh_executable(NAME walsh-worker SRCS main.cc DEPS walsh::worker)
function(walsh_executable)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE walsh_flags ${ARG_DEPS})
  target_compile_options(${ARG_NAME} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fPIE>)
endfunction()

# walsh_test(NAME io_test SRCS a_test.cc b_test.cc DEPS walsh::worker_io [LABELS unit] [TIMEOUT 60])
# One executable and one CTest entry; tests that need real data skip with a reason where it is missing.
# The target tests_<label> builds all tests of a label. A folder whose tests compute and parse little sets
# WALSH_TEST_OPTIONS to -O0: compilers take half as long for them, but what inline functions they share with
# the libraries is slow then, too.
function(walsh_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT" "SRCS;DEPS;LABELS;ENVIRONMENT" ${ARGN})
  if(NOT WALSH_BUILD_TESTS)
    return()
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE walsh_flags walsh::testing ${ARG_DEPS}
                        GTest::gmock GTest::gtest GTest::gtest_main)
  target_compile_options(${ARG_NAME} PRIVATE ${WALSH_TEST_OPTIONS})
  if(WALSH_TEST_OPTIONS)
    walsh_precompiled_headers(${ARG_NAME} ${ARG_DEPS})
  endif()
  if(WALSH_TSAN_WRAPPED)
    target_sources(${ARG_NAME} PRIVATE ${CMAKE_SOURCE_DIR}/tests/testing/tsan_absl.cc)
    foreach(symbol IN LISTS WALSH_TSAN_WRAPPED)
      target_link_options(${ARG_NAME} PRIVATE -Wl,--wrap=${symbol})
    endforeach()
  endif()
  set_target_properties(${ARG_NAME} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  foreach(label IN LISTS ARG_LABELS)
    if(NOT TARGET tests_${label})
      add_custom_target(tests_${label})
    endif()
    add_dependencies(tests_${label} ${ARG_NAME})
  endforeach()
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME})
  set_tests_properties(${ARG_NAME} PROPERTIES
    LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "GTEST_BRIEF=1;WALSH_BIN_DIR=${CMAKE_BINARY_DIR}/bin;WALSH_SOURCE_DIR=${CMAKE_SOURCE_DIR};${ARG_ENVIRONMENT}")
endfunction()

# walsh_bench(NAME matmul_bench SRCS matmul_bench.cc DEPS walsh::kernels)
# The target benches builds all of them.
function(walsh_bench)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS" ${ARGN})
  if(NOT WALSH_BUILD_BENCH)
    return()
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE walsh_flags ${ARG_DEPS} benchmark::benchmark)
  set_target_properties(${ARG_NAME} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench)
  if(NOT TARGET benches)
    add_custom_target(benches)
  endif()
  add_dependencies(benches ${ARG_NAME})
endfunction()
