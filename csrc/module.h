// What module.cpp takes of the others.
#pragma once
#include <pybind11/pybind11.h>

void define_batch(pybind11::module_& m);
void define_gate(pybind11::module_& m);
