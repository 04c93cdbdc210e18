//! Connections to running programs.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vireo_eal::telemetry::{self, TelemetryClient};
use vireo_eal::{Error, ErrorKind, Result};

/// A running program.
#[derive(Debug)]
pub struct Program {
    client: TelemetryClient,
    socket: PathBuf,
    greeting: Value,
}

impl Program {
    /// Connects to the program with the telemetry socket `socket`.
    ///
    /// # Errors
    /// As for [`TelemetryClient::connect`].
    pub fn connect(socket: &Path) -> Result<Self> {
        let client = TelemetryClient::connect(socket)?;
        let greeting = serde_json::from_str(client.greeting()).unwrap_or_default();
        Ok(Self { client, socket: socket.to_owned(), greeting })
    }

    /// Process id.
    pub fn pid(&self) -> u64 {
        self.greeting["pid"].as_u64().unwrap_or_default()
    }

    /// Program and version, as the process calls itself.
    pub fn version(&self) -> String {
        printable(&self.greeting["version"]).unwrap_or_default()
    }

    /// Returns the value of the answer to `request`: null if the program does not know the endpoint.
    ///
    /// # Errors
    /// As for [`TelemetryClient::ask`]; `Protocol` if the answer is not JSON.
    pub fn ask(&self, request: &str) -> Result<Value> {
        let answer: Value = serde_json::from_str(&self.client.ask(request)?).map_err(|error| {
            let what = format!("cannot read the answer of {} to {request}", self.socket.display());
            Error::new(ErrorKind::Protocol, what, error.to_string())
        })?;
        let (endpoint, _) = request.split_once(',').unwrap_or((request, ""));
        Ok(answer.get(endpoint).cloned().unwrap_or_default())
    }
}

/// Returns the telemetry sockets that this user's programs have, or those of programs with one `--file-prefix`.
///
/// # Errors
/// As for [`telemetry::sockets`].
pub fn sockets(prefix: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut sockets = telemetry::sockets()?;
    if let Some(prefix) = prefix {
        let of = |socket: &Path| socket.parent().and_then(Path::file_name).is_some_and(|name| name == prefix);
        sockets.retain(|socket| of(socket));
    }
    Ok(sockets)
}

/// Returns the error of a client that finds no program.
pub fn no_program(prefix: Option<&str>, client: &str) -> Error {
    let which = prefix.map_or(String::new(), |prefix| format!(" with --file-prefix {prefix}"));
    let why = format!("no process of Vireo or DPDK{which} has a telemetry socket that this user may use");
    Error::new(ErrorKind::Unavailable, "nothing to show", why)
        .with_hint(format!("start one, or run {client} as its user or as root"))
}

/// Returns a text without characters that would control a terminal.
pub fn printable(value: &Value) -> Option<String> {
    value.as_str().map(|text| text.chars().filter(|c| !c.is_control()).collect())
}
