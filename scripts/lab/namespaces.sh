# shellcheck shell=bash
# Three hosts natively: a network namespace each, the server joined to each client by a veth pair.
# The names carry this process's id, so that two runs never meet. Uses say.sh.

readonly SERVER_ADDRESS_1=10.199.1.1 CLIENT_ADDRESS_1=10.199.1.2
readonly SERVER_ADDRESS_2=10.199.2.1 CLIENT_ADDRESS_2=10.199.2.2

namespaces_made=()

namespaces_create() {
    namespaces_possible || fail "three hosts natively want root and ip (Debian: apt-get install iproute2); or run with --vm"
    local host
    for host in server client-1 client-2; do
        ip netns add "$(namespace_of "$host")"
        namespaces_made+=("$host")
        ip -n "$(namespace_of "$host")" link set lo up
    done
    namespaces_join 1 "$SERVER_ADDRESS_1" "$CLIENT_ADDRESS_1"
    namespaces_join 2 "$SERVER_ADDRESS_2" "$CLIENT_ADDRESS_2"
}

namespaces_possible() {
    ((EUID == 0)) && command -v ip >/dev/null
}

namespaces_in_use() {
    ((${#namespaces_made[@]} > 0))
}

namespace_of() {
    echo "c1000k-$$-$1"
}

# namespaces_join NUMBER SERVER_ADDRESS CLIENT_ADDRESS
namespaces_join() {
    local server client
    server=$(namespace_of server) client=$(namespace_of "client-$1")
    ip -n "$server" link add "eth$1" type veth peer name eth0 netns "$client"
    ip -n "$server" address add "$2/24" dev "eth$1"
    ip -n "$client" address add "$3/24" dev eth0
    ip -n "$server" link set "eth$1" up
    ip -n "$client" link set eth0 up
}

namespaces_remove() {
    local host
    for host in "${namespaces_made[@]}"; do
        ip netns delete "$(namespace_of "$host")" || true
    done
    namespaces_made=()
}
