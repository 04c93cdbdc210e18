use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;

#[test]
fn the_wait_before_another_try_ends_with_the_port() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, name) = bind(&dir.path().join("socket")).unwrap();
    let _waits = UnixStream::connect(&name.0).unwrap();
    assert!(!ends_soon(&listener), "a frontend that waits does not end it");
    let owner = UnixStream::from(OwnedFd::from(listener.try_clone().unwrap()));
    owner.shutdown(Shutdown::Both).unwrap();
    assert!(ends_soon(&listener));
}

/// Requests the features (`VHOST_USER_GET_FEATURES`) and waits for the answer.
fn ask(mut socket: &UnixStream) -> std::io::Result<()> {
    let request: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    socket.write_all(&request)?;
    socket.read_exact(&mut [0; 20])
}

/// Runs in a process of its own, because the limit applies to the process: see the test below.
#[test]
#[ignore = "run by a_frontend_is_served_when_there_are_files_again"]
fn child_that_runs_out_of_files() {
    vireo_eal::log::init(&[], vireo_eal::log::LogColor::Auto);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _server = Server::listen(&path, &"net_vhost0".into(), &[Arc::default(), Arc::default()]).unwrap();
    let connect = || {
        let socket = UnixStream::connect(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    };
    let first = connect();
    ask(&first).unwrap();
    let second = connect();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 1, hard).unwrap();
    drop(first);
    // The parent has seen the message, and then waited for further ones.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    ask(&second).unwrap();
}

#[test]
fn a_frontend_is_served_when_there_are_files_again() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "vhost::server::tests::child_that_runs_out_of_files", "--ignored", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(|line| line.unwrap());
    let said = lines.find(|line| line.contains("accept")).unwrap();
    std::thread::sleep(Duration::from_millis(3 * u64::from(RETRY)));
    drop(child.stdin.take());
    let rest: Vec<String> = lines.collect();
    assert!(child.wait().unwrap().success(), "{said}: {rest:?}");
    assert!(said.contains("net_vhost0: cannot accept") && said.contains(&more_files(MORE_FILES)), "{said}");
    assert!(!rest.iter().any(|line| line.contains("accept")), "said once: {rest:?}");
}
