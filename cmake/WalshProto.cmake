# walsh_proto(NAME proto ROOT dir PROTOS a.proto … [GRPC]): a static library of generated code.
function(walsh_proto)
  cmake_parse_arguments(ARG "GRPC" "NAME;ROOT" "PROTOS;DEPS" ${ARGN})
  set(out ${CMAKE_BINARY_DIR}/generated)
  file(MAKE_DIRECTORY ${out})
  set(sources)
  foreach(proto IN LISTS ARG_PROTOS)
    string(REGEX REPLACE "\\.proto$" "" stem ${proto})
    set(generated ${out}/${stem}.pb.cc ${out}/${stem}.pb.h)
    set(plugin_args)
    if(ARG_GRPC)
      list(APPEND generated ${out}/${stem}.grpc.pb.cc ${out}/${stem}.grpc.pb.h)
      set(plugin_args --grpc_out=${out} --plugin=protoc-gen-grpc=${WALSH_GRPC_CPP_PLUGIN})
    endif()
    add_custom_command(
      OUTPUT ${generated}
      COMMAND protobuf::protoc -I ${ARG_ROOT} -I ${CMAKE_SOURCE_DIR}/proto -I ${WALSH_GOOGLEAPIS_DIR}
              --cpp_out=${out} ${plugin_args} ${ARG_ROOT}/${proto}
      DEPENDS ${ARG_ROOT}/${proto}
      VERBATIM)
    list(APPEND sources ${generated})
  endforeach()
  add_library(walsh_${ARG_NAME} STATIC ${sources})
  target_include_directories(walsh_${ARG_NAME} SYSTEM PUBLIC ${out})
  target_link_libraries(walsh_${ARG_NAME} PUBLIC protobuf::libprotobuf ${ARG_DEPS})
  add_library(walsh::${ARG_NAME} ALIAS walsh_${ARG_NAME})
endfunction()
