use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vireo_eal::rights;

use super::*;

/// A thread that waits is paused, continues and ends, whether or not a frontend has something for it.
#[test]
fn a_wait_ends_with_the_port_and_pauses_with_it() {
    let (socket, mut frontend) = UnixStream::pair().unwrap();
    let session = Session::new().unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let mut times = 0;
            while session.wait(Some(socket.as_fd()), PollTimeout::NONE) == Woken::Ready {
                { &socket }.read_exact(&mut [0]).unwrap();
                times += 1;
            }
            times
        });
        session.serve();
        for _ in 0..100 {
            session.pause().unwrap();
            session.serve();
        }
        frontend.write_all(&[1]).unwrap();
        session.pause().unwrap();
        session.serve();
        session.end();
        assert!(waits.join().unwrap() <= 1);
    });
    // Whoever waits next ends, too.
    assert_eq!(session.wait(None, PollTimeout::NONE), Woken::End);
}

/// The owner of a port waits for no frontend.
#[test]
fn a_port_in_the_middle_of_a_request_is_not_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let server = Server::listen(&path, &"net_vhost0".into(), &[Arc::default(), Arc::default()]).unwrap();
    let mut frontend = connect(&path);
    ask(&frontend).unwrap();
    let request: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    frontend.write_all(&request[..5]).unwrap();
    let refused = || server.record(&mut Fds::default()).err();
    let error = loop {
        // The thread may not have read what there is of the request yet.
        if let Some(error) = refused() {
            break error;
        }
        server.keep();
    };
    assert!(error.kind() == ErrorKind::Busy && error.why().contains("in the middle of a request"), "{error}");
    frontend.write_all(&request[5..]).unwrap();
    frontend.read_exact(&mut [0; 20]).unwrap();
    ask(&frontend).unwrap();
    assert!(server.record(&mut Fds::default()).unwrap().is_some());
    server.keep();
    ask(&frontend).unwrap();
}

fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Requests the features (`VHOST_USER_GET_FEATURES`) and waits for the answer.
fn ask(mut socket: &UnixStream) -> std::io::Result<()> {
    let request: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    socket.write_all(&request)?;
    socket.read_exact(&mut [0; 20])
}

/// The request handler takes 32 files with a message, and would wait for another message after one with more.
#[test]
fn a_request_with_too_many_files_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _server = Server::listen(&path, &"net_vhost0".into(), &[Arc::default(), Arc::default()]).unwrap();
    for count in [33, 253] {
        let mut frontend = connect(&path);
        let file = tempfile::tempfile().unwrap();
        let request: Vec<u8> = [3_u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        rights::send(&frontend, &request, &vec![file.as_fd(); count]).unwrap();
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0, "{count}");
    }
    ask(&connect(&path)).unwrap();
}

/// Runs in a process of its own, because the limit applies to the process: see the test below.
#[test]
#[ignore = "run by a_frontend_is_served_when_there_are_files_again"]
fn child_that_runs_out_of_files() {
    vireo_eal::log::init(&[], vireo_eal::log::LogColor::Auto);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _server = Server::listen(&path, &"net_vhost0".into(), &[Arc::default(), Arc::default()]).unwrap();
    let first = connect(&path);
    ask(&first).unwrap();
    let second = connect(&path);
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
