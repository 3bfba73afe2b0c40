//! PyTorch, eager and compiled, in a process of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use candle_core::{Error, Result, Tensor, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::case::{Case, EPS, GROUPS, Inputs, Pass};
use super::check::SAMPLES;

const WORKER: &str = include_str!("worker.py");

/// Results of a peer, as [`samples`](super::check::samples), or why there are none.
pub(crate) type Outcome = std::result::Result<Vec<Vec<f64>>, String>;

/// The process, and the directory through which it is given tensors.
pub(crate) struct Torch {
    worker: Worker,
    python: PathBuf,
    dir: TempDir,
    tensors: Value,
}

struct Worker {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    log: PathBuf,
    version: Value,
}

impl Torch {
    pub(crate) fn start(python: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("worker.py"), WORKER)?;
        Ok(Self {
            worker: Worker::start(python, dir.path())?,
            python: python.to_path_buf(),
            dir,
            tensors: json!({}),
        })
    }

    /// PyTorch's version.
    pub(crate) fn version(&self) -> String {
        self.worker.version.as_str().unwrap_or_default().to_string()
    }

    /// Hands over the tensors of the cases to come.
    pub(crate) fn write(&mut self, inputs: &Inputs) -> Result<()> {
        let mut tensors = json!({});
        let named = [
            ("x", Some(&inputs.x)),
            ("weight", inputs.has_weight.then_some(&inputs.weight)),
            ("bias", inputs.bias.as_ref()),
            ("dy", Some(&inputs.dy)),
            ("mean", Some(&inputs.mean)),
            ("var", Some(&inputs.var)),
        ];
        for (name, tensor) in named {
            if let Some(tensor) = tensor {
                let path = self.dir.path().join(name);
                write_tensor(tensor, &path)?;
                tensors[name] = json!({"path": path, "shape": tensor.dims()});
            }
        }
        self.tensors = tensors;
        Ok(())
    }

    /// Loads a case for `peers` and warms it up.
    pub(crate) fn load(
        &mut self,
        case: &Case,
        pass: Pass,
        threads: usize,
        peers: &[&'static str],
    ) -> Result<HashMap<&'static str, Outcome>> {
        let request = json!({
            "op": case.op.name(),
            "shape": case.shape,
            "dtype": case.dtype.as_str(),
            "pass": pass.name(),
            "threads": threads,
            "eps": EPS,
            "groups": GROUPS,
            "samples": SAMPLES,
            "tensors": self.tensors,
            "peers": peers,
        });
        let answer = self.ask(&request.to_string())?;
        let outcome = |peer: &&'static str| {
            let entry = &answer[*peer];
            let samples = serde_json::from_value(entry["samples"].clone());
            let outcome = samples.map_err(|_| match entry["error"].as_str() {
                Some(error) => error.to_string(),
                None => format!("unexpected answer {entry}"),
            });
            (*peer, outcome)
        };
        Ok(peers.iter().map(outcome).collect())
    }

    /// The time of `iterations` calls after `warm` others.
    pub(crate) fn run(&mut self, peer: &str, warm: usize, iterations: usize) -> Result<Duration> {
        let answer = self.ask(&format!("run {peer} {warm} {iterations}"))?;
        match answer["ns"].as_u64() {
            Some(ns) => Ok(Duration::from_nanos(ns)),
            None => bail!("unexpected answer {answer}"),
        }
    }

    /// Frees the loaded case.
    pub(crate) fn done(&mut self) -> Result<()> {
        writeln!(self.worker.to, "done")?;
        Ok(())
    }

    /// One line there, one back. A worker that died is replaced, so that only this case is lost.
    fn ask(&mut self, request: &str) -> Result<Value> {
        match self.worker.ask(request) {
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.worker = Worker::start(&self.python, self.dir.path())?;
                Err(error)
            }
        }
    }
}

impl Worker {
    fn start(python: &Path, dir: &Path) -> Result<Self> {
        let log = dir.join("worker.log");
        let mut child = Command::new(python)
            .arg("-u")
            .arg(dir.join("worker.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .map_err(|e| Error::msg(format!("{}: {e}", python.display())))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the worker has no pipes")
        };
        let mut worker = Self {
            child,
            to,
            from: BufReader::new(from),
            log,
            version: Value::Null,
        };
        worker.version = worker.answer()?;
        Ok(worker)
    }

    fn ask(&mut self, request: &str) -> Result<Value> {
        writeln!(self.to, "{request}")?;
        self.to.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let last = log.lines().last().unwrap_or_default();
            bail!("PyTorch's process ended: {last}")
        }
        serde_json::from_str(&line).map_err(Error::wrap)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_tensor(tensor: &Tensor, path: &Path) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    tensor.write_bytes(&mut file)?;
    file.flush()?;
    Ok(())
}
