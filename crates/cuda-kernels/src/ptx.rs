//! The kernels as PTX of compute capability 8.0. Feature `ptx`.

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// A module of kernels, which a driver loads whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// The module's name.
    pub name: &'static str,
    /// Its PTX.
    pub ptx: &'static str,
}

/// All modules.
pub fn modules() -> impl Iterator<Item = Module> {
    MODULES.iter().map(|&(name, ptx, _)| Module { name, ptx })
}

/// The module that has a kernel.
pub fn module_of(kernel: &str) -> Option<Module> {
    let mut all = MODULES.iter();
    let &(name, ptx, _) = all.find(|(_, _, kernels)| kernels.contains(&kernel))?;
    Some(Module { name, ptx })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Types;
    use crate::geometry::rows::{Norm, Rows};

    #[test]
    fn every_launch_of_rows_has_its_kernel() {
        for norm in Norm::ALL {
            for types in Types::ALL {
                for cols in [
                    1, 7, 32, 100, 256, 777, 1024, 2048, 4096, 9000, 16_384, 32_768, 100_000,
                ] {
                    let shape = Rows {
                        norm,
                        types,
                        rows: 300,
                        cols,
                        aligned: true,
                    };
                    let mut launches = vec![shape.forward().unwrap()];
                    for back in [shape.backward().unwrap(), shape.backward_of_sum().unwrap()] {
                        launches.extend([back.dx, back.finish]);
                        launches.extend(back.columns);
                    }
                    for launch in launches {
                        assert!(module_of(&launch.kernel).is_some(), "{}", launch.kernel);
                    }
                }
            }
        }
    }
}
