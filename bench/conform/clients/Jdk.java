// The JDK's own HttpClient, which asks every server on plain HTTP for HTTP/2.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.stream.Collectors;

class Jdk {
    static final String URL = System.getenv("CONFORM_URL");
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    interface Case { String run() throws Exception; }

    static HttpResponse<String> post(String path, String rest) throws Exception {
        String body = "{\"model\":\"" + System.getenv("CONFORM_MODEL") + "\"," + rest + "}";
        HttpRequest request = HttpRequest.newBuilder(URI.create(URL + path))
            .header("content-type", "application/json")
            .header("authorization", "Bearer " + System.getenv("CONFORM_KEY"))
            .POST(HttpRequest.BodyPublishers.ofString(body)).build();
        return CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
    }

    static void report(String what, Case one) {
        String reason;
        try {
            reason = one.run();
        } catch (Exception error) {
            reason = error.toString();
        }
        String shown = reason.replaceAll("[\"\\\\\\s]+", " ");
        System.out.println("{\"case\":\"" + what + "\",\"passed\":" + reason.isEmpty() + ",\"reason\":\"" + shown + "\"}");
    }

    public static void main(String[] arguments) {
        String chat = "\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}],\"max_tokens\":4";
        report("POST", () -> {
            HttpResponse<String> told = post("/v1/chat/completions", chat);
            return told.statusCode() == 200 ? "" : "status " + told.statusCode();
        });
        report("a second request on the connection", () -> {
            HttpResponse<String> told = post("/v1/chat/completions", chat);
            return told.statusCode() == 200 ? "" : "status " + told.statusCode();
        });
        report("a stream", () -> {
            HttpResponse<String> told = post("/v1/chat/completions", chat + ",\"stream\":true");
            return told.body().lines().collect(Collectors.toList()).contains("data: [DONE]") ? "" : "no end";
        });
    }
}
