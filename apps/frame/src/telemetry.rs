//! Telemetry of a run: answers to DPDK's telemetry clients, from a thread of its own.
//!
//! `vireo_eal::telemetry` has the socket and its clients, [`endpoints`] the answers. They come from [`Facts`]:
//! what does not change while lcores forward, and handles to counters and states that any thread may read.

mod endpoints;

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use serde_json::{Map, Value, json};
use vireo_eal::event::Event;
use vireo_eal::lcore;
use vireo_eal::telemetry::{MAX_ANSWER, TelemetrySocket};

use self::endpoints::{ENDPOINTS, Facts};
use crate::app::App;
use crate::ports::Ports;

/// Thread that answers telemetry clients. Dropping this value ends it.
#[derive(Debug)]
pub struct Telemetry(Option<(Arc<TelemetrySocket>, JoinHandle<()>)>);

impl Telemetry {
    /// Starts the thread, if `app` has a telemetry socket. It runs on CPUs without lcores, if there are any. It answers
    /// from the start or, in a take-over, from the signal of `begin`: until then the predecessor answers.
    pub(crate) fn start(app: &App, ports: &Ports, begin: Option<Event>) -> Self {
        let Some(socket) = app.eal.telemetry() else { return Self(None) };
        let (facts, of_thread) = (Facts::new(app, ports), Arc::clone(socket));
        let lcores = app.eal.lcores.all_cpus();
        let thread = Builder::new().name("vireo-telemetry".into()).spawn(move || {
            lcore::keep_off(&lcores);
            begin.iter().for_each(|begin| of_thread.wait_for(begin));
            of_thread.serve(&info().to_string(), |request| answer(&facts, request));
        });
        match thread {
            Ok(thread) => Self(Some((Arc::clone(socket), thread))),
            Err(error) => {
                tracing::warn!("no telemetry: cannot start its thread: {error}");
                Self(None)
            }
        }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some((socket, thread)) = self.0.take() {
            socket.stop();
            // A panic's message is in the log already.
            let _ = thread.join();
        }
    }
}

/// What a client gets first, and as the answer to `/info`.
fn info() -> Value {
    let version = concat!("Vireo ", env!("CARGO_PKG_VERSION"));
    json!({ "version": version, "pid": std::process::id(), "max_output_len": MAX_ANSWER })
}

/// Answers a request, which is an endpoint and, after a comma, its parameters. The answer is an object with
/// the endpoint as its key. Its value is null if there is no such endpoint, or if the parameters are wrong.
fn answer(facts: &Facts, request: &[u8]) -> String {
    let request = String::from_utf8_lossy(request);
    let request = request.trim_end_matches(['\0', '\n']);
    let (name, parameters) = request.split_once(',').unwrap_or((request, ""));
    let value = match name {
        "/" => Some(json!(names().collect::<Vec<_>>())),
        "/info" => Some(info()),
        "/help" => help(parameters),
        _ => ENDPOINTS
            .iter()
            .find(|endpoint| endpoint.name == name)
            .and_then(|endpoint| (endpoint.answer)(facts, parameters)),
    };
    let of = |value| Value::from(Map::from_iter([(name.to_owned(), value)])).to_string();
    let text = of(value.unwrap_or_default());
    if text.len() <= MAX_ANSWER { text } else { of(Value::Null) }
}

fn names() -> impl Iterator<Item = &'static str> {
    let mut names: Vec<_> =
        ["/", "/help", "/info"].into_iter().chain(ENDPOINTS.iter().map(|endpoint| endpoint.name)).collect();
    names.sort_unstable();
    names.into_iter()
}

/// What an endpoint answers, or how to ask for that.
fn help(name: &str) -> Option<Value> {
    let text = match name {
        "" => return Some(json!("/ lists the endpoints; /help,ENDPOINT describes one")),
        "/" => "names of the endpoints",
        "/info" => "version, pid, and length of the longest answer in bytes",
        "/help" => "what an endpoint answers. Parameter: its name",
        _ => ENDPOINTS.iter().find(|endpoint| endpoint.name == name)?.help,
    };
    Some(Map::from_iter([(name.to_owned(), text.into())]).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::app;
    use crate::ports::tests::ports;

    fn value(facts: &Facts, request: &str) -> Value {
        let (name, _) = request.split_once(',').unwrap_or((request, ""));
        let mut answer: Map<String, Value> =
            serde_json::from_str(&answer(facts, request.as_bytes())).unwrap();
        assert_eq!(answer.len(), 1, "{request}");
        answer.remove(name).unwrap()
    }

    /// Three ports with two queues in each direction, which are not started.
    fn open() -> (App, Ports) {
        let mut ports = ports(&[(0, 1, 0), (1, 0, 1)]).unwrap();
        ports.set_promiscuous(1, true).unwrap();
        let app = app();
        drop(ports.serve_telemetry(&app));
        (app, ports)
    }

    #[test]
    fn each_endpoint_is_listed_described_and_answered() {
        let (app, ports) = open();
        let facts = Facts::new(&app, &ports);
        let listed = value(&facts, "/");
        let names: Vec<&str> = listed.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        assert!(names.is_sorted() && names.len() == ENDPOINTS.len() + 3, "{names:?}");
        for name in names {
            assert!(value(&facts, &format!("/help,{name}"))[name].is_string(), "{name}");
            let without_parameters = value(&facts, name);
            let with_a_number = value(&facts, &format!("{name},0"));
            // Fake devices are not on VFIO or iommufd, pools have names, and rings of DPDK's kind do not exist.
            let needs_more = [
                "/mempool/info",
                "/vfio/info",
                "/iommufd/maps",
                "/ring/info",
                "/ethdev/rx_queue",
                "/ethdev/tx_queue",
            ];
            let is_answered = !without_parameters.is_null() || !with_a_number.is_null();
            assert_eq!(is_answered, !needs_more.contains(&name), "{name}");
        }
        assert_eq!(value(&facts, "/mempool/info,packets")["size"], 32);
        assert_eq!(value(&facts, "/ethdev/rx_queue,1,1")["nb_desc"], 64);
    }

    #[test]
    fn wrong_requests_are_answered_with_null() {
        let (app, ports) = open();
        let facts = Facts::new(&app, &ports);
        for request in [
            "/ethdev/stats",
            "/ethdev/stats,",
            "/ethdev/stats,3",
            "/ethdev/stats,-1",
            "/ethdev/stats,x",
            "/ethdev/stats,99999999999999999999",
            "/ethdev/xstats,0,hide",
            "/ethdev/rx_queue,0",
            "/ethdev/rx_queue,0,2",
            "/eal/lcore/info,9",
            "/eal/memzone_info,7",
            "/help,/nothing",
            "/nothing",
            "nothing",
            "",
        ] {
            assert!(value(&facts, request).is_null(), "{request}");
        }
        for request in [&[0xff; 4096][..], b"\"\\\n\0", &[b','; 4096]] {
            let answer: Value = serde_json::from_str(&answer(&facts, request)).unwrap();
            assert_eq!(answer.as_object().map(Map::len), Some(1), "{request:?}");
        }
    }

    #[test]
    fn counters_of_a_port_are_the_sums_of_its_queues() {
        let (app, mut ports) = open();
        let facts = Facts::new(&app, &ports);
        let counters = ports.counts().port(1).clone();
        for number in 0..2 {
            counters.rx(number).packets.add(10 + number as u64);
            counters.tx(number).bytes.add(600);
            counters.tx(number).dropped.add(3);
        }
        let stats = value(&facts, "/ethdev/stats,1");
        assert_eq!((&stats["ipackets"], &stats["q_ipackets"]), (&json!(21), &json!([10, 11])));
        assert_eq!((&stats["obytes"], &stats["q_obytes"]), (&json!(1200), &json!([600, 600])));
        let expected = json!({
            "rx_good_packets": 21, "rx_q0_packets": 10, "rx_q1_packets": 11, "tx_good_bytes": 1200,
            "tx_q0_bytes": 600, "tx_q1_bytes": 600, "tx_dropped": 6, "tx_q0_dropped": 3, "tx_q1_dropped": 3,
        });
        assert_eq!(value(&facts, "/ethdev/xstats,1,hide_zero=true"), expected);
        let all = value(&facts, "/ethdev/xstats,1");
        for name in ["rx_missed_errors", "rx_mbuf_allocation_errors", "restarts", "link_changes"] {
            assert_eq!(all[name], 0, "{name}");
        }
        let info = value(&facts, "/ethdev/info,1");
        assert_eq!(
            (&info["mtu"], &info["promiscuous"], &info["dev_started"]),
            (&json!(1500), &json!(1), &json!(0))
        );
        assert_eq!((&info["mac_addr"], &info["rxq_state"]), (&json!("02:00:00:00:00:01"), &json!([0, 0])));
        // A port that is closed is gone, and the others keep their numbers.
        assert_eq!(value(&facts, "/ethdev/list"), json!([0, 1, 2]));
        ports.close(0);
        drop(ports.serve_telemetry(&app));
        assert_eq!(value(&facts, "/ethdev/list"), json!([1, 2]));
        assert!(value(&facts, "/ethdev/info,0").is_null());
    }
}
