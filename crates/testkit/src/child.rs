//! Tests that run again in a process of their own, with other environment variables.

use std::process::{Command, Output};

/// A test of a module, as the test harness calls it.
///
/// Where:
///
/// - `module`: the `module_path!()` of the module, which begins with the name of the program
/// - `test`: the name of the function
pub fn name(module: &str, test: &str) -> String {
    match module.split_once("::") {
        Some((_, module)) => format!("{module}::{test}"),
        None => test.to_string(),
    }
}

/// A command that runs one test of this program, by its full [`name`], in another process.
pub fn command(name: &str) -> Command {
    let program = std::env::current_exe().expect("the path of this program");
    let mut command = Command::new(program);
    command.args([name, "--exact", "--nocapture"]);
    command
}

/// Runs a [`command`], and panics unless exactly one test ran and passed.
#[track_caller]
pub fn assert_passes(name: &str, command: &mut Command) -> Output {
    let output = command.output().expect("a process that starts");
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success(),
        "{name} failed in its own process:\n{said}"
    );
    // A name that matches no test would be a success too.
    assert!(said.contains("1 passed"), "{name} did not run:\n{said}");
    output
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn a_name_is_that_of_the_harness() {
        assert_eq!(name("program", "test"), "test");
        assert_eq!(name("program::a::b", "test"), "a::b::test");
        let me = name(module_path!(), "a_test_that_fails_on_purpose");
        assert_eq!(me, "child::tests::a_test_that_fails_on_purpose");
    }

    #[test]
    fn a_test_that_fails_on_purpose() {
        assert!(std::env::var_os("CANDLE_NORM_TESTKIT_FAIL").is_none());
    }

    #[test]
    fn what_fails_or_does_not_run_is_told() {
        let passes = |test: &str, fail: bool| {
            let name = name(module_path!(), test);
            let run = || {
                let mut command = command(&name);
                if fail {
                    command.env("CANDLE_NORM_TESTKIT_FAIL", "1");
                }
                assert_passes(&name, &mut command)
            };
            catch_unwind(run).is_ok()
        };
        assert!(passes("a_test_that_fails_on_purpose", false));
        assert!(!passes("a_test_that_fails_on_purpose", true));
        assert!(!passes("no_such_test", false));
    }
}
