// A bracket: an L-shaped plate with a round bore and a chip set into it, for cases/poisson_gmsh.toml.
// Lengths in metres. Made with Gmsh 4.15.2:
//   gmsh -2 bracket.geo -format msh41 -o bracket.msh
//   gmsh -2 bracket.geo -clscale 2.5 -format msh22 -o bracket_coarse.msh
h = 0.035;

Point(1) = {0.0, 0.0, 0, h};
Point(2) = {1.2, 0.0, 0, h};
Point(3) = {1.2, 0.5, 0, h};
Point(4) = {0.5, 0.5, 0, 0.6 * h};
Point(5) = {0.5, 1.0, 0, h};
Point(6) = {0.0, 1.0, 0, h};
Line(1) = {1, 2};
Line(2) = {2, 3};
Line(3) = {3, 4};
Line(4) = {4, 5};
Line(5) = {5, 6};
Line(6) = {6, 1};

// the bore, held at a temperature
Point(10) = {0.25, 0.72, 0, h};
Point(11) = {0.37, 0.72, 0, 0.7 * h};
Point(12) = {0.25, 0.84, 0, 0.7 * h};
Point(13) = {0.13, 0.72, 0, 0.7 * h};
Point(14) = {0.25, 0.60, 0, 0.7 * h};
Circle(11) = {11, 10, 12};
Circle(12) = {12, 10, 13};
Circle(13) = {13, 10, 14};
Circle(14) = {14, 10, 11};

// the chip, of another material
Point(20) = {0.75, 0.15, 0, h};
Point(21) = {1.05, 0.15, 0, h};
Point(22) = {1.05, 0.35, 0, h};
Point(23) = {0.75, 0.35, 0, h};
Line(21) = {20, 21};
Line(22) = {21, 22};
Line(23) = {22, 23};
Line(24) = {23, 20};

Curve Loop(1) = {1, 2, 3, 4, 5, 6};
Curve Loop(2) = {11, 12, 13, 14};
Curve Loop(3) = {21, 22, 23, 24};
Plane Surface(1) = {1, 2, 3};
Plane Surface(2) = {3};

Physical Curve("bore") = {11, 12, 13, 14};
Physical Curve("foot") = {1};
Physical Curve("end") = {2};
Physical Curve("air") = {3, 4, 5};
Physical Curve("wall") = {6};
Physical Surface("plate") = {1};
Physical Surface("chip") = {2};
