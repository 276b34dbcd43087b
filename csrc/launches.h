// What module.cpp takes of launches.cpp.
#pragma once
#include <pybind11/pybind11.h>

void define_batch(pybind11::module_& m);
