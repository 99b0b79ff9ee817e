# find_package(kvferry): the targets kvferry::kvferry (shared) and kvferry::static.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/kvferry-targets.cmake)

# The static library is C++ inside. CMake would have a C project link it with a C++ compiler that it has
# not looked for; so the C++ runtime is named instead.
if(NOT CMAKE_CXX_COMPILER_LOADED)
  get_target_property(kvferry_configurations kvferry::static IMPORTED_CONFIGURATIONS)
  foreach(kvferry_configuration ${kvferry_configurations})
    set_property(TARGET kvferry::static PROPERTY
      IMPORTED_LINK_INTERFACE_LANGUAGES_${kvferry_configuration} "")
  endforeach()
  set_property(TARGET kvferry::static APPEND PROPERTY INTERFACE_LINK_LIBRARIES stdc++ m)
endif()
